"""One call of a loop's body for many steps at once, by whichever way of batching fits the body.

For rows ``r = 0 .. n-1`` (steps of the loop, in any order), with stacked arguments ``a`` of shape ``(n, ...)``:

    outputs[r] = body(a[r], invariants),   outputs: (n, ...)

The result equals the row-by-row one up to rounding. Bits are the business of the caller, who may bring an evaluator
of its own (:class:`Batch`) where they must be kept.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import fx
from torch._C import _functorch

from fxjacobi.constants import constant
from fxjacobi.device.hazards import indexes_by_guess
from fxjacobi.equations import is_effect
from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.loops import Carried, Invariant, Literal, Loop
from fxjacobi.lowered import lowered
from fxjacobi.trial import MISFITS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Batch", "BatchedBody", "Layout", "Strategy"]

logger = logging.getLogger(__name__)

_bodies: weakref.WeakKeyDictionary[Loop, BatchedBody] = weakref.WeakKeyDictionary()


class Strategy(Enum):
    """How the rows enter the body."""

    SINGLE = "one row: the body as it is"
    FOLD = "rows folded into the batch dimension, (n, B, ...) -> (n * B, ...)"
    PREPEND = "rows as a new leading dimension of the body's own ops"
    VMAP = "the body under torch.func.vmap, traced at its second call"
    EACH = "row after row"


class Batch(Protocol):
    """An evaluator of the body for many rows.

    ``arguments`` follow the body's placeholders: ``(rows, ...)`` for a carried or scanned value or a table, the tensor
    itself for an invariant, a sequence of ``rows`` Python values for a literal. Returns the body's outputs, each
    ``(rows, ...)``.
    """

    def __call__(self, arguments: Sequence[Any], rows: int, /) -> tuple[Any, ...]:
        """Evaluate the body for ``rows`` steps."""
        ...


@dataclass(frozen=True, slots=True)
class Layout:
    """The body for a fixed number of rows: how values are laid out, and the call."""

    strategy: Strategy
    rows: int
    run: Callable[..., Sequence[Any]]
    lifted: tuple[bool, ...]
    device: torch.device
    body: fx.GraphModule | None = None
    loops: dict[Any, Loop] = field(default_factory=dict)
    folded: dict[Any, fx.GraphModule] = field(default_factory=dict)

    def graph(self, arguments: Sequence[Any]) -> fx.GraphModule | None:
        """Return ``run`` as a graph over the packed ``arguments`` that are tensors (and, but for vmap, the others too).

        ``None`` where there is none. ``arguments`` are as ``run`` takes them.
        """
        return self.run.traced(*arguments) if isinstance(self.run, _Mapped) else self.body

    def loop(self, graph: fx.GraphModule, *parts: Any) -> Loop:
        """Return ``Loop(graph, *parts)``, the same one for the same parts, so that it is compiled once."""
        key = (graph, *parts)
        if key not in self.loops:
            self.loops[key] = Loop(graph, *parts)
        return self.loops[key]

    def apart(self, value: torch.Tensor, leading: int) -> bool:
        """Whether :meth:`pack` would copy ``value``, for the rows do not lie side by side in memory."""
        if self.strategy is not Strategy.FOLD or value.shape[leading] == 1 or value.shape[leading + 1] == 1:
            return False
        return value.stride(leading) != value.shape[leading + 1] * value.stride(leading + 1)

    def folding(self, graph: fx.GraphModule, shapes: tuple[tuple[int, tuple[int, ...]], ...]) -> fx.GraphModule:
        """Return ``graph`` with some placeholders, by number, reshaped first; the same one each time."""
        if shapes not in self.folded:
            reshaped = fx.Graph()
            values: dict[fx.Node, fx.Node] = {}
            placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
            to = {placeholders[index]: shape for index, shape in shapes}
            for node in graph.graph.nodes:
                made = values[node] = reshaped.node_copy(node, lambda n: values[n])
                if node in to:
                    reshape = torch.ops.aten.reshape.default
                    values[node] = reshaped.call_function(reshape, (made, list(to[node])))
            # The output of a graph that reads a placeholder reads what that became. A module takes over the submodules
            # that its graph calls (loops in the body) when it is made: it is made of the whole graph.
            copy = fx.GraphModule(graph, reshaped)
            self.folded[shapes] = copy
        return self.folded[shapes]

    def pack(self, value: torch.Tensor, leading: int = 0) -> torch.Tensor:
        """Lay ``(..., rows, *shape)`` out as ``run`` takes it, with ``leading`` dimensions before the rows."""
        if self.strategy is Strategy.FOLD:
            return value.flatten(leading, leading + 1)
        return value.select(leading, 0) if self.strategy is Strategy.SINGLE else value

    def unpack(self, value: torch.Tensor, leading: int = 0) -> torch.Tensor:
        """Undo :meth:`pack`."""
        if self.strategy is Strategy.FOLD:
            return value.reshape(*value.shape[:leading], self.rows, -1, *value.shape[leading + 1 :])
        return value.unsqueeze(leading) if self.strategy is Strategy.SINGLE else value

    def literal(self, index: int, values: Sequence[Any]) -> Any:
        """Return what ``run`` takes for a literal argument whose rows are ``values``."""
        if self.strategy is Strategy.EACH:
            return values
        if self.lifted[index] and self.strategy is not Strategy.SINGLE:
            dtype = torch.float64 if any(isinstance(v, float) for v in values) else torch.int64
            return constant(values, dtype=dtype, device=self.device)
        return values[0]


_LIFTED: dict[Any, Any] = {
    getattr(getattr(torch.ops.aten, name), scalar): getattr(getattr(torch.ops.aten, name), tensor)
    for names, scalar, tensor in (
        (("add", "sub", "mul", "div", "rsub", "eq", "ne", "lt", "le", "gt", "ge"), "Scalar", "Tensor"),
        (("add", "sub", "mul", "div", "rsub", "eq", "ne", "lt", "le", "gt", "ge"), "Tensor", "Tensor"),
        (("pow",), "Tensor_Scalar", "Tensor_Tensor"),
    )
    for name in names
}


class _Mapped:
    """The body under vmap; traced into plain ATen at its second call, because vmap costs more than small ops."""

    def __init__(self, function: Callable[..., Any], mapped: Sequence[bool]) -> None:
        self._mapped = tuple(mapped)
        self._function = function
        self._calls = 0
        self._traced: fx.GraphModule | None = None

    def __call__(self, *arguments: Any) -> Sequence[Any]:
        plain = not torch.is_grad_enabled() and _functorch.peek_interpreter_stack() is None
        if self._traced is not None and plain:
            return self._traced.forward(*(a for a in arguments if isinstance(a, torch.Tensor)))  # type: ignore[no-any-return]
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        dims = tuple(
            0 if m else None for a, m in zip(arguments, self._mapped, strict=True) if isinstance(a, torch.Tensor)
        )

        def of_tensors(*values: torch.Tensor) -> Any:
            rest = iter(values)
            return self._function(*(next(rest) if isinstance(a, torch.Tensor) else a for a in arguments))

        mapped: Callable[..., Any] = torch.func.vmap(of_tensors, dims) if any(d == 0 for d in dims) else of_tensors
        self._calls += 1
        if self._calls >= 2 and plain:
            self._traced = lowered(mapped, *tensors)
            return self._traced.forward(*tensors)  # type: ignore[no-any-return]
        result: Sequence[Any] = mapped(*tensors)
        return result

    def traced(self, *arguments: Any) -> fx.GraphModule | None:
        """Return the trace, which holds for arguments of the same shapes and the same Python values."""
        while self._traced is None and self._calls < 2:
            self(*arguments)
        return self._traced


class BatchedBody:
    """The default :class:`Batch`: folds, prepends, maps or, at last, goes row by row, whichever gives the body's values.

    The first call with more than one row compares each way with the body itself on random states, in that order, and
    keeps the first that agrees; a body whose rows are not independent under a way (a softmax over dimension 0, say)
    therefore never runs that way.

    Args:
        loop: The loop whose body this is; its nodes carry their specs.
    """

    def __init__(self, loop: Loop) -> None:
        self.bindings = loop.bindings
        self.body: fx.GraphModule = loop.body
        output = next(node for node in reversed(self.body.graph.nodes) if node.op == "output")
        self.output_specs = tuple(spec_of(n) if isinstance(n, fx.Node) else None for n in output.args[0])
        self.placeholders = [node for node in self.body.graph.nodes if node.op == "placeholder"]
        self.mapped = tuple(not isinstance(b, (Invariant, Literal)) for b in loop.bindings)
        self.varying = tuple(isinstance(b, Literal) and any(v != b.values[0] or type(v) is not type(b.values[0])
                                                            for v in b.values) for b in loop.bindings)  # fmt: skip
        self.device = next((s.device for s in self.output_specs if isinstance(s, TensorSpec)), torch.device("cpu"))
        self.agreed = False
        """Whether a whole trajectory was found to agree with the body's single steps."""
        self._lifted_body: fx.GraphModule | None = None
        self._strategy: Strategy | None = None
        self._layouts: dict[int, Layout] = {}

    @staticmethod
    def of(loop: Loop) -> BatchedBody:
        """Return the loop's evaluator: one for its lifetime, so that ways are chosen and traced once."""
        found = _bodies.get(loop)
        if found is None:
            found = _bodies[loop] = BatchedBody(loop)
        return found

    @cached_property
    def pure(self) -> bool:
        """Whether the body may run on guesses: no random draws, no guards, and no index that could stop a device for good."""
        if any(is_effect(node) for node in self.body.graph.nodes):
            return False
        carried = [p for p, b in zip(self.placeholders, self.bindings, strict=True) if isinstance(b, Carried)]
        return self.device.type == "cpu" or indexes_by_guess(self.body, carried) is None

    @cached_property
    def uniform(self) -> bool:
        """Whether every carried value has the spec of the output it carries, so that steps can be stacked."""
        for binding, placeholder in zip(self.bindings, self.placeholders, strict=True):
            if isinstance(binding, Carried):
                before, after = spec_of(placeholder), self.output_specs[binding.output]
                if not isinstance(before, TensorSpec) or not isinstance(after, TensorSpec):
                    return False
                if (before.shape, before.dtype, before.device) != (after.shape, after.dtype, after.device):
                    return False
                if torch.Size(before.shape).numel() == 0:
                    return False
        return True

    def __call__(self, arguments: Sequence[Any], rows: int) -> tuple[Any, ...]:
        """Evaluate the body for ``rows`` steps; see :class:`Batch`."""
        layout = self.layout(arguments, rows)
        outputs = layout.run(*self.prepare(layout, arguments))
        return tuple(layout.unpack(o) if isinstance(o, torch.Tensor) else o for o in outputs)

    def prepare(self, layout: Layout, arguments: Sequence[Any]) -> list[Any]:
        """Lay stacked ``arguments`` out for ``layout.run``."""
        prepared: list[Any] = []
        for index, (argument, mapped) in enumerate(zip(arguments, self.mapped, strict=True)):
            if isinstance(self.bindings[index], Literal):
                prepared.append(layout.literal(index, argument))
            else:
                prepared.append(layout.pack(argument) if mapped else argument)
        return prepared

    def layout(self, arguments: Sequence[Any], rows: int) -> Layout:
        """Return the layout for ``rows`` rows, choosing the strategy on its first use (``arguments`` as in a call)."""
        if rows not in self._layouts:
            if rows > 1 and self._strategy is None:
                self._strategy = self._choose(arguments, rows)
            strategy = Strategy.SINGLE if rows == 1 or self._strategy is None else self._strategy
            self._layouts[rows] = self._build(strategy, rows)
        return self._layouts[rows]

    def known(self, rows: int) -> Layout | None:
        """Return the layout for ``rows`` rows if there is one already."""
        return self._layouts.get(rows)

    def _build(self, strategy: Strategy, rows: int) -> Layout:
        run: Callable[..., Sequence[Any]] = self.body.forward
        if strategy is Strategy.EACH:

            def run(*arguments: Any) -> Sequence[Any]:
                return self._each(arguments, rows)

        elif strategy is Strategy.VMAP:
            body = self._lift() if any(self.varying) else self.body
            if body is None:
                raise TypeError("a literal that varies is used where no tensor can stand")
            mapped = [m or v for m, v in zip(self.mapped, self.varying, strict=True)]
            run = _Mapped(body.forward, mapped)
        graph = self.body if strategy in (Strategy.SINGLE, Strategy.FOLD, Strategy.PREPEND) else None
        return Layout(strategy, rows, run, self.varying, self.device, graph)

    def _each(self, arguments: Sequence[Any], rows: int) -> Sequence[Any]:
        bindings = self.bindings
        outputs = [
            self.body(*(a if isinstance(b, Invariant) else a[row] for a, b in zip(arguments, bindings, strict=True)))
            for row in range(rows)
        ]
        columns = zip(*outputs, strict=True)
        return [torch.stack(column) if isinstance(column[0], torch.Tensor) else column[0] for column in columns]

    def _lift(self) -> fx.GraphModule | None:
        """Return the body with varying literals as 0-dimensional tensors, or ``None`` where an op needs the number."""
        if self._lifted_body is not None:
            return self._lifted_body
        graph = fx.Graph()
        environment: dict[fx.Node, fx.Node] = {}
        lifted = {p for p, varying in zip(self.placeholders, self.varying, strict=True) if varying}
        for node in self.body.graph.nodes:
            copy = environment[node] = graph.node_copy(node, lambda n: environment[n])
            if not lifted.intersection(node.all_input_nodes):
                continue
            if node.target not in _LIFTED or lifted.intersection(
                v for v in node.kwargs.values() if isinstance(v, fx.Node)
            ):
                return None
            copy.target = _LIFTED[node.target]
        self._lifted_body = fx.GraphModule(self.body, graph)
        return self._lifted_body

    def _choose(self, arguments: Sequence[Any], rows: int) -> Strategy:
        """Compare each way with the body on the real inputs and random states, at the first, middle and last row."""
        probe = list(arguments)
        for index, binding in enumerate(self.bindings):
            if isinstance(binding, Carried) and arguments[index].is_floating_point():
                # The caller's random state is not touched: a private generator draws the probe.
                noise = torch.randn(arguments[index].shape, generator=torch.Generator().manual_seed(0))
                probe[index] = noise.to(arguments[index])
        some = sorted({0, rows // 2, rows - 1})
        picked = [a if isinstance(b, Invariant) else [a[r] for r in some]
                  for a, b in zip(probe, self.bindings, strict=True)]  # fmt: skip
        wanted = self._each(picked, len(some))
        candidates = [Strategy.VMAP]
        if not any(self.varying):
            stacked = [p.meta.get("spec") for p, m in zip(self.placeholders, self.mapped, strict=True) if m]
            leading = {s.shape[:1] for s in (*stacked, *self.output_specs) if isinstance(s, TensorSpec)}
            candidates = [*([Strategy.FOLD] if len(leading) == 1 and () not in leading else []), Strategy.PREPEND,
                          Strategy.VMAP]  # fmt: skip
        for strategy in candidates:
            try:
                layout = self._build(strategy, rows)
                found = layout.run(*self.prepare(layout, probe))
                agrees = all(
                    _close(layout.unpack(f)[some], w)
                    for f, w in zip(found, wanted, strict=True)
                    if isinstance(w, torch.Tensor)
                )
            except MISFITS as misfit:
                logger.debug("body %s does not run as %s: %s", type(self.body).__name__, strategy.name, misfit)
                continue
            if agrees:
                return strategy
        return Strategy.EACH


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two values agree as far as another order of rounding allows."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if not wanted.is_floating_point() and not wanted.is_complex():
        return torch.equal(found, wanted)
    scale = wanted.abs().nan_to_num(0.0, 0.0, 0.0).amax().item() if wanted.numel() else 0.0
    bound = torch.finfo(wanted.dtype).eps ** 0.5 * max(scale, torch.finfo(wanted.dtype).tiny)
    return torch.allclose(found, wanted, rtol=0.0, atol=bound, equal_nan=True)
