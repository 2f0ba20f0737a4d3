"""A read-only view of a loop as a triangular system of equations, with stacked evaluation.

    s_t = h_t(s_{t-d} for each distance d),   t = 0 .. T-1,   s_t for t < 0 given by the loop's operands

(arXiv 2002.03629, section 3). The state is the tuple of the body's carried outputs ("components"); a trajectory
keeps each stacked, ``(T, *shape)``.
"""

from __future__ import annotations

import copy
import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fxjacobi.batched_body import Batch, BatchedBody
from fxjacobi.constants import constant, positions
from fxjacobi.footprint import row_bytes
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked, Step, Table
from fxjacobi.scripted_loop import one_step, scripted_steps, stacking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Carry", "States", "System"]

logger = logging.getLogger(__name__)

States: TypeAlias = tuple[torch.Tensor, ...]
"""One trajectory: each component of the state for all steps, ``(T, *shape)``."""


class Carry:
    """One carried placeholder: which component it reads, from how far back, and the values before the loop."""

    def __init__(self, placeholder: int, component: int, distance: int, before: torch.Tensor) -> None:
        self.placeholder = placeholder
        self.component = component
        self.distance = distance
        self.before = before
        self.depth = before.shape[0]  # min(distance, T)

    def window(self, states: States, start: int, stop: int) -> torch.Tensor:
        """Return what the placeholder reads at steps ``start .. stop-1``."""
        return self.shifted(states[self.component], 0, start, stop)

    def at(self, states: States, steps: Sequence[int]) -> torch.Tensor:
        """Return what the placeholder reads at each of ``steps``, ``(len(steps), *shape)``."""
        values = states[self.component]
        earlier = tuple([s - self.distance if s > self.distance else 0 for s in steps])
        read = values.index_select(0, positions(earlier, values.device))
        for row, step in enumerate(steps):
            if step < self.distance:
                read[row] = self.before[step]
        return read

    def shifted(self, values: torch.Tensor, origin: int, start: int, stop: int) -> torch.Tensor:
        """:meth:`window` of a component known from step ``origin`` on (``values[0]`` is step ``origin``)."""
        first, last = start - self.distance, stop - self.distance
        if first >= 0:
            return values[first - origin : last - origin]
        known = self.before[start : min(stop, self.distance)]
        return known if last <= 0 else torch.cat([known, values[: last - origin]])


class System:
    """The equations of one call of a loop.

    Args:
        loop: A recurrence.
        operands: The operands of the call.
        batch: Evaluator of many rows; by default the loop's :class:`BatchedBody`. One that keeps bits belongs to the
            exact contract.
        memory_limit: Bytes that one batched evaluation may allocate for its values; it is cut into ranges of steps
            that fit. Without one, running out of memory halves the ranges and goes on.
    """

    def __init__(
        self,
        loop: Loop,
        operands: Sequence[Any],
        *,
        batch: Batch | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.loop = loop
        # Rows aligned as the loop itself aligns them: the bits of the steps run in order depend on it.
        self.operands = loop.align(operands)
        self.steps = loop.trip_count
        self.body = BatchedBody.of(loop)
        self.batch: Batch = batch if batch is not None else self.body
        carried = [(i, b) for i, b in enumerate(loop.bindings) if isinstance(b, Carried)]
        self.components = tuple(sorted({b.output for _, b in carried}))
        self.carries = tuple(
            Carry(i, self.components.index(b.output), b.distance,
                  torch.stack([self.operands[o] for o in b.init[: self.steps]]))
            for i, b in carried
        )  # fmt: skip
        self.reach = max((c.distance for c in self.carries), default=1)
        self.nearest = min((c.distance for c in self.carries), default=self.steps)
        carried_outputs = set(self.components)
        self.others = tuple(sorted({r.output for r in loop.results} - carried_outputs))
        self.memory_limit = memory_limit
        self.rows_limit = self._rows_within(memory_limit)

    def _rows_within(self, memory_limit: int | None) -> int:
        if memory_limit is None:
            return self.steps
        return max(1, min(self.steps, memory_limit // max(1, row_bytes(self.loop))))

    @cached_property
    def _inputs(self) -> tuple[Any, ...]:
        """For each placeholder, its values at all steps where they are known beforehand."""
        inputs: list[Any] = []
        for binding in self.loop.bindings:
            match binding:
                case Scanned(operand, dim, indices):
                    inputs.append(_scan_view(self.operands[operand], dim, indices))
                case Table(operands):
                    inputs.append(torch.stack([self.operands[o] for o in operands]))
                case Literal(values):
                    inputs.append(values)
                case Invariant(operand):
                    inputs.append(self.operands[operand])
                case Carried():
                    inputs.append(None)
        return tuple(inputs)

    def arguments(self, states: States, start: int, stop: int) -> list[Any]:
        """Return the body's stacked arguments at steps ``start .. stop-1`` of a trajectory."""
        arguments = self.fixed(slice(start, stop))
        for carry in self.carries:
            arguments[carry.placeholder] = carry.window(states, start, stop)
        return arguments

    def fixed(self, steps: slice) -> list[Any]:
        """Return the body's stacked arguments at ``steps``, ``None`` where they are carried."""
        pairs = zip(self._inputs, self.loop.bindings, strict=True)
        return [v if v is None or isinstance(b, Invariant) else v[steps] for v, b in pairs]

    def between(self, start: int, stop: int, states: States) -> System:
        """Return the equations of steps ``start .. stop-1``, given a trajectory that is right before them.

        What comes back evaluates sweeps; it neither completes nor collects results.
        """
        carries = tuple(
            Carry(c.placeholder, c.component, c.distance, c.window(states, start, min(start + c.distance, stop)))
            for c in self.carries
        )
        return self._derived(stop - start, self.fixed(slice(start, stop)), carries, self.rows_limit)

    def of_samples(self, samples: torch.Tensor) -> System:
        """Return the equations of some samples alone; see :class:`fxjacobi.methods.frozen.Samples` for when it may.

        What comes back evaluates sweeps; it neither completes nor collects results.
        """
        inputs = [v.index_select(1, samples) if m and v is not None else v
                  for v, m in zip(self._inputs, self.body.mapped, strict=True)]  # fmt: skip
        carries = tuple(
            Carry(c.placeholder, c.component, c.distance, c.before.index_select(1, samples)) for c in self.carries
        )
        rows = self.rows_limit * self.carries[0].before.shape[1] // samples.shape[0]
        return self._derived(self.steps, inputs, carries, rows)

    def _derived(self, steps: int, inputs: Sequence[Any], carries: tuple[Carry, ...], rows: int) -> System:
        derived = copy.copy(self)
        derived.steps, derived.carries, derived.operands = steps, carries, ()
        derived.nearest = min((c.distance for c in carries), default=steps)
        derived.rows_limit = max(1, min(steps, rows))
        derived.__dict__["_inputs"] = tuple(inputs)
        return derived

    def evaluate(self, states: States, start: int = 0, stop: int | None = None) -> tuple[Any, ...]:
        """Return all outputs of the body at steps ``start .. stop-1``, each ``(stop - start, ...)``, in one sweep.

        Raises:
            torch.OutOfMemoryError: One step by itself does not fit.
        """
        stop = self.steps if stop is None else stop
        pieces: list[tuple[Any, ...]] = []
        at = start
        while at < stop:
            end = min(stop, at + self.rows_limit)
            try:
                pieces.append(self.batch(self.arguments(states, at, end), end - at))
            except torch.OutOfMemoryError:
                if end - at == 1:
                    raise
                self.rows_limit = (end - at + 1) // 2
                logger.info("a sweep of %d steps does not fit in memory; going on with %d", end - at, self.rows_limit)
                continue
            at = end
        if len(pieces) == 1:
            return pieces[0]
        columns = zip(*pieces, strict=True)
        return tuple(torch.cat(column) if isinstance(column[0], torch.Tensor) else column[0] for column in columns)

    def evaluate_at(self, states: States, steps: Sequence[int]) -> tuple[Any, ...]:
        """Return all outputs of the body at some steps of a trajectory, each ``(len(steps), ...)``."""
        arguments: list[Any] = []
        for value, binding in zip(self._inputs, self.loop.bindings, strict=True):
            if value is None or isinstance(binding, Invariant):
                arguments.append(value)
            elif isinstance(binding, Literal):
                arguments.append([value[s] for s in steps])
            else:
                arguments.append(value.index_select(0, positions(tuple(steps), value.device)))
        for carry in self.carries:
            arguments[carry.placeholder] = carry.at(states, steps)
        return self.batch(arguments, len(steps))

    def next_states(self, states: States, start: int = 0, stop: int | None = None) -> States:
        """Return ``h`` of a trajectory at steps ``start .. stop-1``."""
        return self.pick(self.evaluate(states, start, stop))

    def pick(self, outputs: Sequence[Any]) -> States:
        """Return the components of the state among the body's outputs."""
        return tuple(outputs[c] for c in self.components)

    def base(self) -> States:
        """Return the trajectory in which nothing happens: every component keeps its value before the loop."""
        states: list[torch.Tensor] = []
        for component in range(len(self.components)):
            carry = next(c for c in self.carries if c.component == component)
            states.append(carry.before[-1].expand(self.steps, *carry.before.shape[1:]))
        return tuple(states)

    def complete(self, states: States, others: dict[int, torch.Tensor], prefix: int) -> tuple[States, dict[int, Any]]:
        """Run steps ``prefix .. T-1`` in order, as the loop does, from a trajectory that is right before them.

        Returns:
            The trajectory, and the stacked outputs that are results but no state.
        """
        outputs_of = (*self.components, *self.others)
        steps = scripted_steps(stacking(self.loop, outputs_of)) if prefix < self.steps else None
        if steps is not None:
            before = [
                self._before(binding, states, prefix) for binding in self.loop.bindings if isinstance(binding, Carried)
            ]
            known = [*(s[:prefix] for s in states), *(others[o][:prefix] if prefix else None for o in self.others)]
            found = steps.resume(self.operands, prefix, before)
            whole = [f if k is None or not prefix else torch.cat([k, f]) for k, f in zip(known, found, strict=True)]
            return tuple(whole[: len(states)]), dict(zip(self.others, whole[len(states) :], strict=True))
        done: dict[int, list[torch.Tensor]] = {
            o: list(v[:prefix]) for o, v in zip(self.components, states, strict=True)
        }
        rest: dict[int, list[torch.Tensor]] = {o: list(others[o][:prefix]) if prefix else [] for o in self.others}
        for step in range(prefix, self.steps):
            arguments = [self._at(i, step, done) for i in range(len(self.loop.bindings))]
            outputs = self.loop.body(*arguments)
            for output, values in (*done.items(), *rest.items()):
                values.append(outputs[output])
        return tuple(torch.stack(done[c]) for c in self.components), {o: torch.stack(v) for o, v in rest.items()}

    def _before(self, carry: Carried, states: States, start: int) -> list[torch.Tensor]:
        """The values that a carry reads at steps ``start .. start + distance - 1``, as far as they are known."""
        values = states[self.components.index(carry.output)]
        read = range(start - carry.distance, start)
        return [values[t] if t >= 0 else self.operands[carry.init[t + carry.distance]]
                for t in read if t >= 0 or t + carry.distance < len(carry.init)]  # fmt: skip

    def single(self, states: States, step: int) -> list[Any]:
        """Return the body's arguments at one step of a trajectory, as the loop binds them."""
        done = dict(zip(self.components, states, strict=True))
        return [self._at(i, step, done) for i in range(len(self.loop.bindings))]

    def alone(self, states: States, step: int) -> tuple[Any, ...]:
        """Return the body's outputs at one step of a trajectory, evaluated by itself as the loop does."""
        return tuple(one_step(self.loop)(*self.single(states, step)))

    def _at(self, index: int, step: int, done: Mapping[int, Sequence[torch.Tensor] | torch.Tensor]) -> Any:
        match self.loop.bindings[index]:
            case Carried(output, distance, init):
                return done[output][step - distance] if step >= distance else self.operands[init[step]]
            case Scanned(operand, dim, indices):
                return self.operands[operand].select(dim, indices[step])
            case Table(operands):
                return self.operands[operands[step]]
            case Literal(values):
                return values[step]
            case Invariant(operand):
                return self.operands[operand]

    def results(self, states: States, others: dict[int, torch.Tensor]) -> tuple[Any, ...]:
        """Return the loop's results from a solved trajectory."""
        stacked = dict(zip(self.components, states, strict=True)) | others
        values: list[Any] = []
        for result in self.loop.results:
            match result:
                case Step(output, step):
                    values.append(stacked[output][step])
                case Stacked(output):
                    values.append(stacked[output])
        return tuple(values)


def _scan_view(operand: torch.Tensor, dim: int, indices: Sequence[int]) -> torch.Tensor:
    """Return ``operand.select(dim, i)`` for all ``i`` of ``indices``, stacked; a view where they run forward evenly."""
    size = operand.shape[dim]
    even = _forward(indices, size)
    if even is not None:
        index = [slice(None)] * (dim % operand.dim()) + [slice(even.start, even.stop, even.step)]
        return operand[tuple(index)].movedim(dim, 0)
    at = [i % size for i in indices]
    return operand.index_select(dim, constant(at, device=operand.device)).movedim(dim, 0)


def _forward(indices: Sequence[int], size: int) -> range | None:
    """Return indices below ``size`` as a range that runs forward, or ``None`` where they do not."""
    if isinstance(indices, range) and indices.step > 0 and indices.start >= 0 and indices.stop <= size:
        return indices
    at = [i % size for i in indices]
    stride = at[1] - at[0] if len(at) > 1 else 1
    even = range(at[0], at[-1] + 1, stride) if stride > 0 else None
    return even if even is not None and list(even) == at else None
