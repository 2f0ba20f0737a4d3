"""The adjoint of a recurrence: itself a triangular system, running backwards, that the same methods solve.

With cotangents ``g_{o,t}`` of the body's outputs and ``m_{b,t}`` of what carry ``b`` reads at step ``t``:

    m_{b,t} = (d h_t / d read_b)^T c_t,   c_{o,t} = g_{o,t} + sum over the carries b of o of m_{b,t+d_b}

Then one batched vector-Jacobian product with ``c`` gives the gradients of all operands.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.batched_body import BatchedBody
from fxjacobi.graph import TensorSpec
from fxjacobi.loops import Binding, Carried, Loop, Scanned, Stacked, Table
from fxjacobi.lowered import lowered
from fxjacobi.methods.guess import Base, Previous
from fxjacobi.methods.sequential import Sequential
from fxjacobi.solve import lawful, solve_system
from fxjacobi.system import States, System

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.methods.method import Contract, Method

__all__ = ["Adjoint"]

logger = logging.getLogger(__name__)


class Adjoint:
    """The adjoint equations of a loop.

    Args:
        loop: The loop.
        operands: Operands of its shapes, to trace the adjoint's body with.

    Attributes:
        warm_start: Start from the adjoint trajectory of the call before (training steps).
        previous: That trajectory.
    """

    def __init__(self, loop: Loop, operands: Sequence[Any]) -> None:
        self.loop = loop
        specs = BatchedBody.of(loop).output_specs
        wanted = {r.output for r in loop.results} | {b.output for b in loop.bindings if isinstance(b, Carried)}
        self.outputs = tuple(o for o in sorted(wanted) if _smooth(specs[o]))
        self.carries = tuple(
            (i, b) for i, b in enumerate(loop.bindings) if isinstance(b, Carried) and b.output in self.outputs
        )
        self.warm_start = False
        self.previous: States | None = None
        varies = any(BatchedBody.of(loop).varying)
        # A literal that varies would be baked into the trace: such loops run their adjoint step by step instead.
        self.reversed = None if varies else self._reversed(operands)

    def _reversed(self, operands: Sequence[Any]) -> Loop:
        """Return the adjoint as a loop over ``T-1 .. 0``; operands: the loop's, reads, cotangents, zeros."""
        steps = self.loop.trip_count
        bindings: list[Binding] = []
        backwards = range(steps - 1, -1, -1)
        reads = [i for i, b in enumerate(self.loop.bindings) if isinstance(b, Carried)]
        for index, binding in enumerate(self.loop.bindings):
            match binding:
                case Carried():
                    bindings.append(Scanned(len(operands) + reads.index(index), 0, backwards))
                case Scanned(operand, dim, indices):
                    bindings.append(Scanned(operand, dim, [indices[t] for t in backwards]))
                case Table(table):
                    bindings.append(Table(tuple(table[t] for t in backwards)))
                case _:
                    bindings.append(binding)
        offset = len(operands) + len(reads)
        bindings += [Scanned(offset + i, 0, backwards) for i in range(len(self.outputs))]
        offset += len(self.outputs)
        for position, (_, binding) in enumerate(self.carries):
            zero = offset + position
            bindings.append(Carried(position, binding.distance, (zero,) * min(binding.distance, steps)))
        arguments = [_detached(a) for a in self.loop.bind(operands, 0, [])]
        sample = self.loop.body(*arguments)
        cotangents = [torch.zeros_like(sample[o]) for o in self.outputs]
        zeros = [torch.zeros_like(arguments[i]) for i, _ in self.carries]
        read, given = len(arguments), len(arguments) + len(cotangents)

        def step(*flat: Any) -> tuple[Any, ...]:
            return self._step(flat[:read], flat[read:given], flat[given:])

        flat = [*arguments, *cotangents, *zeros]
        body = lowered(step, *flat)
        return Loop(body, steps, bindings, [Stacked(i) for i in range(len(self.carries))])

    def _step(self, arguments: Sequence[Any], cotangents: Sequence[Any], later: Sequence[Any]) -> tuple[Any, ...]:
        """Return ``m_{b,t}`` of all carries, given the body's arguments, ``g_t`` and ``m_{b,t+d_b}``."""

        def outputs(*read: torch.Tensor) -> tuple[torch.Tensor, ...]:
            changed = list(arguments)
            for (index, _), value in zip(self.carries, read, strict=True):
                changed[index] = value
            values = self.loop.body(*changed)
            return tuple(values[o] for o in self.outputs)

        totals = list(cotangents)
        for (_, binding), value in zip(self.carries, later, strict=True):
            position = self.outputs.index(binding.output)
            totals[position] = totals[position] + value
        transposed: Any = torch.func.vjp(outputs, *(arguments[i] for i, _ in self.carries))[1]
        return tuple(transposed(tuple(totals)))

    def gradients(
        self,
        operands: Sequence[Any],
        states: States,
        cotangents: dict[int, torch.Tensor],
        method: Method,
        contract: Contract,
        memory_limit: int | None,
    ) -> list[torch.Tensor | None]:
        """Return the gradient of each operand (``None`` where it needs none).

        Args:
            operands: Of the solved call; those that require gradients say so.
            states: The solved trajectory.
            cotangents: ``g`` of each output in :attr:`outputs`, (T, ...).
            method: How to solve the adjoint equations; in order where it does not apply to them.
            contract: Tolerances; the exact contract solves in order.
            memory_limit: As for the forward solve.
        """
        detached = [_detached(o) for o in operands]
        system = System(self.loop, detached, memory_limit=memory_limit)
        with torch.no_grad():
            moved = self._solved(system, states, cotangents, method, contract, memory_limit)
            totals = dict(cotangents)
            for (_, binding), value in zip(self.carries, moved, strict=True):
                total = totals[binding.output].clone()
                total[: -binding.distance] += value[binding.distance :]
                totals[binding.output] = total
        return self._products(operands, states, moved, totals, memory_limit)

    def _solved(
        self,
        system: System,
        states: States,
        cotangents: dict[int, torch.Tensor],
        method: Method,
        contract: Contract,
        memory_limit: int | None,
    ) -> States:
        """Return ``m_b`` of each carry, (T, ...), in the order of the steps."""
        reads = [carry.window(states, 0, system.steps) for carry in system.carries]
        given = [cotangents[o] for o in self.outputs]
        if self.reversed is not None and lawful(method, self.reversed, contract) and not isinstance(method, Sequential):
            position = {carry.placeholder: i for i, carry in enumerate(system.carries)}
            zeros = [torch.zeros_like(reads[position[i]][0]) for i, _ in self.carries]
            backward = System(self.reversed, [*system.operands, *reads, *given, *zeros], memory_limit=memory_limit)
            guess = Previous(self.previous) if self.warm_start and self.previous is not None else Base()
            solved = solve_system(backward, method, contract, guess).states
            if self.warm_start:
                self.previous = solved
            return tuple(s.flip(0) for s in solved)
        moved: list[list[torch.Tensor]] = [[] for _ in self.carries]
        for back in range(system.steps):
            step = system.steps - 1 - back
            arguments = system.single(states, step)
            later = [
                column[back - b.distance] if back >= b.distance else torch.zeros_like(arguments[i])
                for (i, b), column in zip(self.carries, moved, strict=True)
            ]
            now = self._step(arguments, [g[step] for g in given], later)
            for column, value in zip(moved, now, strict=True):
                column.append(value)
        return tuple(torch.stack(column[::-1]) for column in moved)

    def _products(
        self,
        operands: Sequence[Any],
        states: States,
        moved: States,
        totals: dict[int, torch.Tensor],
        memory_limit: int | None,
    ) -> list[torch.Tensor | None]:
        """Return the operands' gradients by batched products of all steps, range by range."""
        needing = [i for i, o in enumerate(operands) if isinstance(o, torch.Tensor) and o.requires_grad]
        leaves = list(operands)
        for index in needing:
            leaves[index] = operands[index].detach().requires_grad_()
        gradients: list[torch.Tensor | None] = [None] * len(operands)

        def add(index: int, value: torch.Tensor) -> None:
            before = gradients[index]
            gradients[index] = value if before is None else before + value

        start, rows = 0, self.loop.trip_count
        system: System | None = None
        while start < self.loop.trip_count:
            if system is None:
                with torch.enable_grad():
                    system = System(self.loop, leaves, memory_limit=memory_limit)
                rows = min(rows, system.rows_limit)
                for carry in system.carries:
                    carry.before = carry.before.detach()
            stop = min(system.steps, start + rows)
            try:
                found = self._range(system, states, totals, [leaves[i] for i in needing], start, stop)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                rows = (stop - start + 1) // 2
                system = None  # what the ranges share of the graph may be spent
                logger.info("gradients of %d steps do not fit in memory; going on with %d", stop - start, rows)
                continue
            for index, value in zip(needing, found, strict=True):
                if value is not None:
                    add(index, value)
            start = stop
        for (_, binding), value in zip(self.carries, moved, strict=True):
            for step, operand in enumerate(binding.init[: self.loop.trip_count]):
                if operand in needing:
                    add(operand, value[step])
        return gradients

    def _range(
        self,
        system: System,
        states: States,
        totals: dict[int, torch.Tensor],
        leaves: list[torch.Tensor],
        start: int,
        stop: int,
    ) -> Sequence[torch.Tensor | None]:
        """Return what steps ``start .. stop-1`` add to the gradients of ``leaves``."""
        with torch.enable_grad():
            outputs = system.body(system.arguments(states, start, stop), stop - start)
            pairs = [(outputs[o], totals[o][start:stop]) for o in self.outputs if outputs[o].requires_grad]
            if not pairs:
                return [None] * len(leaves)
            return torch.autograd.grad(
                [p[0] for p in pairs],
                leaves,
                [p[1] for p in pairs],
                allow_unused=True,
                retain_graph=stop < system.steps,  # ranges share the views of the operands
            )


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def _smooth(spec: object) -> bool:
    return isinstance(spec, TensorSpec) and (spec.dtype.is_floating_point or spec.dtype.is_complex)
