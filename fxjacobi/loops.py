"""A rolled loop: its body as a graph, and where every value that the body reads comes from.

The system of equations (arXiv 2002.03629, section 3) in the form the compiler keeps it:

    outputs_t = body(bindings at t),   t = 0 .. T-1

where each placeholder of ``body`` has one :data:`Binding`, in order, and the body's flat output tuple is
``outputs``. The loop's own value is the tuple of its :data:`Result` entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx, nn

from fxjacobi.errors import PassError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "Binding",
    "Carried",
    "Invariant",
    "Kind",
    "Literal",
    "Loop",
    "Result",
    "Scanned",
    "Stacked",
    "Step",
    "Table",
    "align_rows",
    "read_at",
]


@dataclass(frozen=True, slots=True)
class Carried:
    """Body output ``output`` of step ``t - distance``; for ``t < distance``, operand ``init[t]``."""

    output: int
    distance: int
    init: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scanned:
    """``operand.select(dim, indices[t])``: a slice of a tensor that is there before the loop starts.

    ``owned`` says that in the unrolled program the slice was a tensor with memory of its own, which the compiler has
    stacked along ``dim=0``. Such a slice is aligned in memory as a new tensor is: the last bits of a small matrix
    product depend on it (measured: 12 of 16 offsets of float32 operands of 2 or 3 rows give other bits).
    """

    operand: int
    dim: int
    indices: Sequence[int]
    owned: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Operand ``operands[t]``: one operand a step (parameters of equal layers, items of a list)."""

    operands: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Literal:
    """The Python value ``values[t]`` (an index, a scalar) that the unrolled code held at step ``t``."""

    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Invariant:
    """Operand ``operand``, the same at every step."""

    operand: int


Binding: TypeAlias = Carried | Scanned | Table | Literal | Invariant


def _slice(value: Any, scanned: Scanned, index: int) -> Any:
    return value.select(scanned.dim, index)


def read_at(
    binding: Binding,
    step: int,
    operands: Sequence[Any],
    outputs: Sequence[Sequence[Any]],
    select: Callable[[Any, Scanned, int], Any] = _slice,
) -> Any:
    """Return what a placeholder reads at ``step``, in whatever form the operands come: tensors, nodes, abstract values.

    Args:
        binding: Of the placeholder.
        step: One of ``0 .. T-1``.
        operands: The loop's.
        outputs: ``outputs[t]`` are the body's outputs of the steps before, in the same form.
        select: ``select(operand, scanned, index)`` is the slice of a scanned operand in that form.
    """
    match binding:
        case Carried(output, distance, init):
            before = step - distance
            return outputs[before][output] if before >= 0 else operands[init[step]]
        case Scanned(operand, _, indices):
            return select(operands[operand], binding, indices[step])
        case Table(table):
            return operands[table[step]]
        case Literal(values):
            return values[step]
        case Invariant(operand):
            return operands[operand]


@dataclass(frozen=True, slots=True)
class Step:
    """Body output ``output`` of step ``step`` (``T - 1``: the final value)."""

    output: int
    step: int


@dataclass(frozen=True, slots=True)
class Stacked:
    """Body output ``output`` of all steps, stacked along a new first dimension: ``(T, ...)``."""

    output: int


Result: TypeAlias = Step | Stacked


_ALIGNMENT = 64  # bytes: what torch's CPU allocator gives every tensor


def align_rows(stack: torch.Tensor) -> torch.Tensor:
    """Return ``stack`` ``(T, ...)``, or a copy of it, with dense rows that start at multiples of 64 bytes."""
    row = stack[0].numel()
    unit = max(1, _ALIGNMENT // stack.element_size())
    dense = stack.stride(0) % unit == 0 and stack[0].is_contiguous()
    if row == 0 or (dense and stack.storage_offset() % unit == 0):
        return stack
    padded = torch.empty(stack.shape[0], -(-row // unit) * unit, dtype=stack.dtype, device=stack.device)
    rows = padded[:, :row].unflatten(1, stack.shape[1:]) if stack.dim() > 1 else padded[:, 0]
    return rows.copy_(stack)


class Kind(Enum):
    """What a loop's dependence structure is, once it is a single component."""

    MAP = "map"
    RECURRENCE = "recurrence"
    FIXED_POINT = "fixed_point"
    WRITES = "writes"


class Loop(nn.Module):
    """A rolled loop; calling it runs it step by step (Gauss-Seidel), which is its definition.

    Args:
        body: Graph of one step. It holds no ``get_attr`` of tensors: everything comes through its placeholders.
        trip_count: Number of steps ``T >= 1``.
        bindings: One for each placeholder of ``body``, in order.
        results: What the loop returns, as a tuple.
        reason: Why it runs step by step, where a pass has looked for something better.
    """

    def __init__(
        self,
        body: fx.GraphModule,
        trip_count: int,
        bindings: Sequence[Binding],
        results: Sequence[Result],
        reason: str = "",
    ) -> None:
        super().__init__()
        self.reason = reason
        self.body = body
        self.trip_count = trip_count
        self.bindings = tuple(bindings)
        self.results = tuple(results)
        placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
        if len(placeholders) != len(self.bindings):
            raise PassError(f"a loop body of {len(placeholders)} placeholders has {len(self.bindings)} bindings")

    def bind(self, operands: Sequence[Any], step: int, outputs: Sequence[Sequence[Any]]) -> list[Any]:
        """Return the body's arguments at ``step``; ``outputs[t]`` are the body's outputs of the steps before."""
        return [read_at(binding, step, operands, outputs) for binding in self.bindings]

    def align(self, operands: Sequence[Any]) -> tuple[Any, ...]:
        """Return the operands with the rows of owned stacks aligned in memory as tensors of their own are."""
        aligned = list(operands)
        for binding in self.bindings:
            if isinstance(binding, Scanned) and binding.owned:
                aligned[binding.operand] = align_rows(aligned[binding.operand])
        return tuple(aligned)

    def collect(
        self,
        outputs: Sequence[Sequence[Any]] | Mapping[int, Sequence[Any]],
        stack: Callable[[list[Any]], Any] = torch.stack,
    ) -> tuple[Any, ...]:
        """Return the loop's results, given the body's outputs at every step that they name.

        Args:
            outputs: ``outputs[t]`` are those of step ``t``, in whatever form (:func:`read_at`).
            stack: Joins the values of all steps in that form.
        """
        results: list[Any] = []
        for result in self.results:
            match result:
                case Step(output, step):
                    results.append(outputs[step][output])
                case Stacked(output):
                    results.append(stack([outputs[t][output] for t in range(self.trip_count)]))
        return tuple(results)

    def forward(self, *operands: Any) -> tuple[Any, ...]:
        """Run the loop in order and return its results."""
        operands = self.align(operands)
        outputs: list[Sequence[Any]] = []
        stacked = {result.output for result in self.results if isinstance(result, Stacked)}
        named = {result.step for result in self.results if isinstance(result, Step)}
        depth = max((b.distance for b in self.bindings if isinstance(b, Carried)), default=1)
        for step in range(self.trip_count):
            outputs.append(self.body(*self.bind(operands, step, outputs)))
            old = step - depth
            if (
                old >= 0 and old not in named
            ):  # nobody reads it again: a long loop over a large array would hold T of them
                outputs[old] = [value if k in stacked else None for k, value in enumerate(outputs[old])]
        return self.collect(outputs)

    def with_reason(self, reason: str) -> Loop:
        """Return the same loop, saying why it stays as it is."""
        return Loop(self.body, self.trip_count, self.bindings, self.results, reason)

    def with_body(self, body: fx.GraphModule) -> Loop:
        """Return the same loop over a body of the same placeholders and outputs."""
        return Loop(body, self.trip_count, self.bindings, self.results, self.reason)

    @property
    def kind(self) -> Kind:
        """Map without a carry; fixed point with a carry and nothing else that changes; recurrence otherwise."""
        if not any(isinstance(b, Carried) for b in self.bindings):
            return Kind.MAP
        if any(isinstance(b, (Scanned, Table, Literal)) for b in self.bindings):
            return Kind.RECURRENCE
        return Kind.FIXED_POINT

    def extra_repr(self) -> str:
        """The loop's parts, for printing."""
        return f"trip_count={self.trip_count}, bindings={self.bindings}, results={self.results}"
