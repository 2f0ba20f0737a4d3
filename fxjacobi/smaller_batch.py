"""The same sampling loop for fewer samples: its body written out again with another batch size, where that is proven.

    X: (B, ...), X'[p_t] = v_t(G(X), noise_t)   ->   X: (b, ...), the same, for the samples numbered ``kept``

Where the samples of a batch lie is followed from the array through every operation (:mod:`fxjacobi.sample_rules`); an
operation that mixes them, or is not known, refuses. What does not depend on the array (conditioning, noise, masks) stays
as it is, and the part of it that belongs to the samples is taken where it meets them. So each sample's equations are
those of the whole batch. Their bits may differ (a product of fewer rows), which is for the caller to measure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxjacobi import ops, sample_layers, sample_moves
from fxjacobi.assemble import assemble
from fxjacobi.causal_rules.pointwise import is_pointwise
from fxjacobi.emit import call, tensors_of
from fxjacobi.graph import Spec, TensorSpec, operation_of, site_of, spec_of, spec_of_value, stamp
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Scanned, Step, Table
from fxjacobi.sample_axis import NotPerSample, SampleAxis, resized, take
from fxjacobi.sample_rules import Axes, rule_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.array_loop import ArrayLoop

__all__ = ["OperandPart", "SmallerBatch", "smaller_batch"]

aten = torch.ops.aten

_RULES = (sample_layers, sample_moves)
"""The modules that register rules."""

_KEPT = -1

_ROUNDS = 4
"""How often where carried values hold samples is guessed from where the last guess left them."""


@dataclass(frozen=True, slots=True)
class OperandPart:
    """An operand of the smaller loop.

    Args:
        operand: Number of the whole loop's operand; ``-1``: the numbers of the samples kept.
        axis: Where that operand holds the samples; ``None``: it is taken whole.
    """

    operand: int
    axis: SampleAxis | None


@dataclass(frozen=True, eq=False)
class SmallerBatch:
    """A sampling loop for fewer samples.

    Args:
        loop: The loop; its only result is the array.
        parts: Where its operands come from.
        axis: Where the array holds the samples.
        samples: How many the whole loop has.
        fewer: How many this one has.
        names: The smaller body's name of each of the whole body's nodes that it evaluates for fewer samples.
        states: For each value that is carried beside the array, by its name in the whole body: its name in the smaller
            one, and where it holds samples (``None``: it has none).
    """

    loop: Loop
    parts: tuple[OperandPart, ...]
    axis: SampleAxis
    samples: int
    fewer: int
    names: dict[str, str]
    states: dict[str, tuple[str, SampleAxis | None]]

    def operands(self, operands: Sequence[Any], kept: torch.Tensor) -> tuple[Any, ...]:
        """Return the smaller loop's operands for the samples numbered ``kept``."""
        return tuple(
            kept if part.operand == _KEPT else self._part(operands[part.operand], part.axis, kept)
            for part in self.parts
        )

    def _part(self, operand: Any, axis: SampleAxis | None, kept: torch.Tensor) -> Any:
        return operand if axis is None else take(operand, axis, kept, self.samples)


def smaller_batch(structure: ArrayLoop, dim: int, fewer: int) -> SmallerBatch:
    """Return ``structure``'s loop with ``fewer`` samples along dimension ``dim`` of the array.

    Raises:
        NotPerSample: Samples are mixed, or not known not to be.
    """
    states: dict[fx.Node, SampleAxis | None] = dict.fromkeys(structure.states)
    for _ in range(_ROUNDS + len(states)):
        shrink = _Shrink(structure, SampleAxis(dim), structure.array_spec.shape[dim], fewer, states)
        try:
            result = shrink.run()
        except _Wanted as wanted:
            states = {**states, wanted.state: wanted.axis}
            continue
        found = {node: shrink.handed(node) for node in states}
        if found == states:
            return result
        states = found
    raise NotPerSample("what is carried beside the array holds samples in another place at each step")


class _Wanted(Exception):  # noqa: N818 - an answer, caught by the only caller
    """What is carried beside the array is read as if it held samples along ``axis``."""

    def __init__(self, state: fx.Node, axis: SampleAxis) -> None:
        super().__init__()
        self.state, self.axis = state, axis


@dataclass
class _Shrink:
    """The smaller body, as it grows (a :class:`fxjacobi.sample_rules.Shrink`)."""

    structure: ArrayLoop
    array_axis: SampleAxis
    samples: int
    fewer: int
    states: dict[fx.Node, SampleAxis | None]
    graph: fx.Graph = field(default_factory=fx.Graph)
    bindings: list[Binding] = field(default_factory=list)
    parts: list[OperandPart] = field(default_factory=list)
    axes: dict[fx.Node, Axes] = field(default_factory=dict)
    held: dict[fx.Node, fx.Node] = field(default_factory=dict)
    free: dict[tuple[fx.Node, SampleAxis | None], fx.Node] = field(default_factory=dict)
    examples: dict[fx.Node, Any] = field(default_factory=dict)
    kept: fx.Node | None = None

    def run(self) -> SmallerBatch:
        structure = self.structure
        body = structure.loop.body
        outputs = [structure.carry, *structure.states.values()]
        for number, (node, axis) in enumerate({structure.array: self.array_axis, **self.states}.items()):
            init = tuple(self._operand(operand, axis) for operand in outputs[number].init)
            new = self._placeholder(node, Carried(number, 1, init), axis)
            if axis is None:
                self.free[node, None] = new
            else:
                self.axes[node], self.held[node] = axis, new
        for node in body.graph.nodes:
            if node.op in ("placeholder", "output") or node.target in ops.GUARDS:
                continue
            if any(used in self.axes for used in node.all_input_nodes):
                self._held_node(node)
        end = structure.outputs[structure.carry.output]
        if self.axes[end] != self.array_axis:
            raise NotPerSample("the array's samples change places")
        handed = [structure.outputs[state.output] for state in structure.states.values()]
        self.graph.output((self.held[end], *(self.operand(node, self.axis(node)) for node in handed)))
        trip_count = structure.trip_count
        loop = Loop(assemble(self.graph, body), trip_count, self.bindings, [Step(0, trip_count - 1)])
        names = {old.name: new.name for old, new in self.held.items()}
        states = {n.name: (self.operand(n, axis).name, axis) for n, axis in self.states.items()}
        return SmallerBatch(loop, tuple(self.parts), self.array_axis, self.samples, self.fewer, names, states)

    def handed(self, state: fx.Node) -> SampleAxis | None:
        """Where what a step hands on to ``state`` holds samples."""
        return self.axis(self.structure.outputs[self.structure.states[state].output])

    # -- what rules ask --------------------------------------------------------------------------------------------

    def axis(self, node: fx.Node) -> SampleAxis | None:
        """Where samples lie in ``node``'s value; ``None`` where it does not depend on the array."""
        found = self.axes.get(node)
        if isinstance(found, tuple):
            raise NotPerSample(f"{node} has several results")
        return found

    def operand(self, value: Any, wanted: SampleAxis | None) -> Any:
        """The smaller program's form of an argument, with the samples along ``wanted`` (``None``: it has none)."""
        if not isinstance(value, fx.Node):
            return value
        if value in self.axes:
            if self.axes[value] != wanted:
                raise NotPerSample(f"{value} holds samples elsewhere than where they are expected")
            return self.held[value]
        found = self.free.get((value, wanted))
        if found is None:
            found = self.free[value, wanted] = self._whole(value) if wanted is None else self._slice(value, wanted)
        return found

    def example(self, value: Any) -> Any:
        """``value`` with the Python values of the first step in place of nodes."""
        return map_arg(value, self._first)

    def _first(self, node: fx.Node) -> Any:
        binding = self.structure.bindings.get(node)
        if not isinstance(binding, Literal):
            raise NotPerSample(f"the size or place in {node} depends on data")
        return binding.values[0]

    # -- nodes -----------------------------------------------------------------------------------------------------

    def _held_node(self, node: fx.Node) -> None:
        """Emit a node that holds samples."""
        source: Any = node.args[0] if node.args else None
        several = self.axes.get(source) if isinstance(source, fx.Node) else None
        axes: Axes
        args: tuple[Any, ...]
        kwargs: dict[str, Any] = {}
        if isinstance(several, tuple):
            chosen = several[node.args[1]] if isinstance(node.args[1], int) else None
            if chosen is None:
                raise NotPerSample(f"{source} has results that are not per sample, and {node} reads one")
            axes, args = chosen, (self.held[source], node.args[1])
        else:
            axes, args, kwargs = rule_of(node)(self, node)

            def placed(one: fx.Node) -> Any:  # places and sizes that are nodes, which a rule passes on as they are
                return one if one.graph is self.graph else self.operand(one, None)

            args, kwargs = map_arg(args, placed), map_arg(kwargs, placed)
        self.axes[node] = axes
        spec = self._resized(spec_of(node), axes)
        copy = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        self.held[node] = stamp(copy, spec, site_of(node))
        self._check(node, copy, axes)

    def _resized(self, spec: Spec, axes: Axes) -> Spec:
        if isinstance(spec, TensorSpec) and isinstance(axes, SampleAxis):
            return resized(spec, axes, self.samples, self.fewer)
        if isinstance(spec, tuple) and isinstance(axes, tuple):
            return tuple(s if a is None else self._resized(s, a) for s, a in zip(spec, axes, strict=True))
        raise NotPerSample(f"{spec} is not one tensor for each place of samples")

    def _check(self, node: fx.Node, copy: fx.Node, axes: Axes) -> None:
        """Compare the shapes that the smaller operation has on the meta device with those that it must have."""

        def example(one: fx.Node) -> Any:
            return self.examples[one] if one in self.examples else _empty(spec_of(one))

        assert callable(node.target)
        try:
            value = node.target(*map_arg(copy.args, example), **map_arg(copy.kwargs, example))
        except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as error:
            raise NotPerSample(f"{operation_of(node)} does not run on {self.fewer} samples: {error}") from error
        found, wanted = spec_of_value(value), spec_of(copy)
        held = (axes,) if isinstance(axes, SampleAxis) else axes
        for a, b, axis in zip(tensors_of(found), tensors_of(wanted), held, strict=False):
            if axis is not None and a.shape != b.shape:
                raise NotPerSample(f"{operation_of(node)} gives {a.shape} for {self.fewer} samples, not {b.shape}")

    # -- what does not depend on the array -------------------------------------------------------------------------

    def _whole(self, node: fx.Node) -> fx.Node:
        if node.op == "placeholder":
            return self._placeholder(node, self._rebound(self.structure.bindings[node], None), None)
        copy = self.graph.node_copy(node, lambda one: self.operand(one, None))
        return stamp(copy, spec_of(node), site_of(node))

    def _slice(self, node: fx.Node, axis: SampleAxis) -> fx.Node:
        """Emit the part of ``node``'s value that belongs to the samples kept."""
        spec = spec_of(node)
        assert isinstance(spec, TensorSpec)
        part = resized(spec, axis, self.samples, self.fewer)
        if node in self.states:
            raise _Wanted(node, axis)
        if node.op == "placeholder":
            return self._placeholder(node, self._rebound(self.structure.bindings[node], axis), axis)
        if node.op == "call_function" and is_pointwise(node.target):
            # Of a pointwise operation the part is the operation on parts.
            def place(one: fx.Node) -> Any:
                own = spec_of(one)
                if not isinstance(own, TensorSpec):
                    return self.operand(one, None)
                here = axis.moved(len(own.shape) - len(spec.shape))
                there = here.dim >= 0 and own.shape[here.dim] == axis.length(self.samples)
                return self.operand(one, here if there else None)

            args, kwargs = map_arg(node.args, place), map_arg(dict(node.kwargs), place)
            copy = self.graph.create_node(node.op, node.target, args, kwargs)
            return stamp(copy, part, site_of(node))
        whole, kept = self.operand(node, None), self._kept()
        if axis.outer == axis.inner == 1:
            return call(self.graph, aten.index_select.default, whole, axis.dim, kept)
        before, after = spec.shape[: axis.dim], spec.shape[axis.dim + 1 :]
        apart = [*before, axis.outer, self.samples, axis.inner, *after]
        taken = call(self.graph, aten.reshape.default, whole, apart)
        taken = call(self.graph, aten.index_select.default, taken, axis.dim + 1, kept)
        return call(self.graph, aten.reshape.default, taken, [*part.shape])

    def _kept(self) -> fx.Node:
        if self.kept is None:
            spec = TensorSpec((self.fewer,), torch.int64, self.structure.array_spec.device, (1,))
            self.kept = self._first_placeholder("kept", spec, Invariant(self._operand(_KEPT, None)))
        return self.kept

    def _rebound(self, binding: Binding, axis: SampleAxis | None) -> Binding:
        match binding:
            case Scanned(operand, dim, indices, owned):
                shifted = axis.moved(int(axis.dim >= dim)) if axis is not None else None
                return Scanned(self._operand(operand, shifted), dim, indices, owned)
            case Table(operands):
                return Table(tuple(self._operand(operand, axis) for operand in operands))
            case Invariant(operand):
                return Invariant(self._operand(operand, axis))
            case Literal():
                return binding
            case Carried():
                raise AssertionError("what is carried has its own placeholder")

    def _operand(self, operand: int, axis: SampleAxis | None) -> int:
        part = OperandPart(operand, axis)
        if part not in self.parts:
            self.parts.append(part)
        return self.parts.index(part)

    def _placeholder(self, node: fx.Node, binding: Binding, axis: SampleAxis | None) -> fx.Node:
        spec = spec_of(node) if axis is None else self._resized(spec_of(node), axis)
        new = self._first_placeholder(node.name, spec, binding)
        if isinstance(binding, Literal):
            self.examples[new] = binding.values[0]
        return new

    def _first_placeholder(self, name: str, spec: Spec, binding: Binding) -> fx.Node:
        """Placeholders are made as they are needed; a graph has them first."""
        with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
            new = stamp(self.graph.placeholder(name), spec)
        self.bindings.insert(0, binding)
        return new


def _empty(spec: Spec) -> Any:
    if isinstance(spec, TensorSpec):
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")
    return None if spec is None else tuple(_empty(item) for item in spec)
