"""Rules for operations that move elements: views, joins, selections by index, writes.

A movement is checked on the elements' numbers, at both sizes.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi import ops
from fxjacobi.causal_rules.views import MOVES
from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.rule_table import overloads
from fxjacobi.sample_axis import SampleAxis, axis_of_ids, resized, sample_ids, take
from fxjacobi.sample_rules import Resized, Shrink, given, mixes, only, sample_rule, shape_of, with_parts

if TYPE_CHECKING:
    from collections.abc import Callable

# -- views and joins ------------------------------------------------------------------------------------------------------

_SIZES = frozenset(
    overloads("view.default", "_unsafe_view", "reshape", "view_copy.default", "expand", "expand_copy", "broadcast_to")
)


def _scaled(node: fx.Node, value: Any, axis: SampleAxis, s: Shrink) -> Any:
    """Return a place or length along the samples' dimension, which must be one of whole batches."""
    if value is None or value == 0 or (isinstance(value, int) and value >= axis.length(s.samples)):
        return value
    batch = s.samples * axis.inner
    if not isinstance(value, int) or value % batch:
        raise mixes(node, "takes a part of them")
    return value // batch * s.fewer * axis.inner


_RESHAPES = frozenset(overloads("view.default", "_unsafe_view", "view_copy.default"))


def _mover(node: fx.Node) -> Callable[..., Any]:
    """Return what moves elements as ``node`` does, whatever their strides."""
    target: Any = torch.ops.aten.reshape.default if node.target in _RESHAPES else node.target
    return target  # type: ignore[no-any-return]


@sample_rule(*MOVES - {operator.getitem})
def _move(s: Shrink, node: fx.Node) -> Resized:
    axis = only(s, node)
    shape = shape_of(node.args[0])  # type: ignore[arg-type]
    target = _mover(node)
    ids = sample_ids(shape, axis, s.samples)
    moved = target(ids, *s.example(node.args[1:]), **s.example(dict(node.kwargs)))
    parts = [moved] if isinstance(moved, torch.Tensor) else list(moved)
    axes = [axis_of_ids(part, s.samples) for part in parts]
    if any(one is None for one in axes):
        raise mixes(node)
    rest, kwargs = list(node.args[1:]), dict(node.kwargs)
    name = str(node.target)
    if node.target in _SIZES:
        spec, out = spec_of(node), axes[0]
        assert isinstance(spec, TensorSpec)
        assert out is not None
        rest[0] = [out.length(s.fewer) if d == out.dim else size for d, size in enumerate(spec.shape)]
    elif given(node, "dim") is not None and int(given(node, "dim")) % len(shape) == axis.dim:
        if "slice" in name:
            rest[1:3] = [_scaled(node, value, axis, s) for value in rest[1:3]]
        elif "split" in name and isinstance(rest[0], (list, tuple)):
            rest[0] = [_scaled(node, value, axis, s) for value in rest[0]]
        elif "split" in name:
            rest[0] = _scaled(node, rest[0], axis, s)
    _check_move(s, node, axis, axes, tuple(rest))
    args = (s.operand(node.args[0], axis), *rest)
    return (axes[0] if isinstance(moved, torch.Tensor) else tuple(axes)), args, kwargs  # type: ignore[return-value]


def _check_move(s: Shrink, node: fx.Node, axis: SampleAxis, axes: list[Any], rest: tuple[Any, ...]) -> None:
    """Compare the elements that both sizes move, by their numbers."""
    shape, target, kept = shape_of(node.args[0]), _mover(node), torch.arange(s.fewer)  # type: ignore[arg-type]
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    kwargs = s.example(dict(node.kwargs))
    wanted = target(numbers, *s.example(node.args[1:]), **kwargs)
    try:
        found = target(take(numbers, axis, kept, s.samples), *s.example(rest), **kwargs)
    except (RuntimeError, IndexError) as error:
        raise mixes(node, f"does not move fewer of them: {error}") from error
    one = isinstance(wanted, torch.Tensor)
    for a, b, out in zip([wanted] if one else wanted, [found] if one else found, axes, strict=True):
        if not torch.equal(take(a, out, kept, s.samples), b):
            raise mixes(node, "does not move fewer of them alike")


@sample_rule(ops.restride)
def _restride(s: Shrink, node: fx.Node) -> Resized:
    axis, spec = only(s, node), spec_of(node)
    assert isinstance(spec, TensorSpec)
    return axis, (s.operand(node.args[0], axis), resized(spec, axis, s.samples, s.fewer).stride), {}


@sample_rule("cat", "stack")
def _join(s: Shrink, node: fx.Node) -> Resized:
    parts: list[fx.Node] = list(node.args[0])  # type: ignore[arg-type]
    shape = shape_of(node)
    dim = int(given(node, "dim")) % len(shape)
    stacked = "stack" in str(node.target)
    found = {a for n in parts if (a := s.axis(n)) is not None}
    if len({(a.dim, a.inner) for a in found}) != 1 or (len(found) != 1 and any(a.dim != dim for a in found)):
        raise mixes(node)
    axis = found.pop()
    out = axis.moved(1) if stacked and axis.dim >= dim else axis
    if not stacked and axis.dim == dim:  # whole batches one after another
        batch = s.samples * axis.inner
        lengths = [shape_of(n)[dim] for n in parts]
        if any(length % batch for length in lengths):
            raise mixes(node)
        each = [SampleAxis(dim, length // batch, axis.inner) for length in lengths]
        out = SampleAxis(dim, sum(one.outer for one in each), axis.inner)
    else:
        each = [axis] * len(parts)
    args = [s.operand(n, a) for n, a in zip(parts, each, strict=True)]
    return out, (args, *node.args[1:]), dict(node.kwargs)


# -- indices --------------------------------------------------------------------------------------------------------


@sample_rule("embedding")
def _embedding(s: Shrink, node: fx.Node) -> Resized:
    axis = only(s, node, 1)
    return axis, *with_parts(s, node, {1: axis})


@sample_rule("gather", "scatter.src", "scatter.value", "scatter_add")
def _gather(s: Shrink, node: fx.Node) -> Resized:
    tensors = {i: n for i, n in enumerate(node.args) if isinstance(n, fx.Node)}
    found = {a for n in tensors.values() if (a := s.axis(n)) is not None}
    if len(found) != 1 or node.kwargs.get("sparse_grad"):
        raise mixes(node)
    axis = found.pop()
    dim = int(node.args[1]) % len(shape_of(node))  # type: ignore[arg-type]
    if dim == axis.dim or any(
        shape_of(n)[axis.dim : axis.dim + 1] != (axis.length(s.samples),) for n in tensors.values()
    ):
        raise mixes(node)
    return axis, *with_parts(s, node, dict.fromkeys(tensors, axis))


@sample_rule("index_select")
def _index_select(s: Shrink, node: fx.Node) -> Resized:
    axis = only(s, node)
    if int(node.args[1]) % len(shape_of(node)) == axis.dim:  # type: ignore[arg-type]
        raise mixes(node)
    return axis, *with_parts(s, node, {0: axis})


@sample_rule("index.Tensor", "_unsafe_index.Tensor")
def _index(s: Shrink, node: fx.Node) -> Resized:
    base, indices = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    assert isinstance(base, fx.Node)
    given = [n for n in indices if isinstance(n, fx.Node)]
    specs = [spec_of(n) for n in given]
    if any(isinstance(spec, TensorSpec) and spec.dtype in (torch.bool, torch.uint8) for spec in specs):
        raise mixes(node)
    if len(indices) == 1 and s.axis(base) is None:  # a table, read by sample
        axis = s.axis(given[0])
        assert axis is not None
        return axis, (s.operand(base, None), [s.operand(given[0], axis)]), {}
    axis = only(s, node)
    if axis.dim < len(indices) and indices[axis.dim] is not None:
        raise mixes(node)
    places = [None if n is None else torch.zeros(shape_of(n), dtype=torch.long) for n in indices]
    target: Any = node.target
    out = axis_of_ids(target(sample_ids(shape_of(base), axis, s.samples), places), s.samples)
    if out is None:
        raise mixes(node)
    args, kwargs = with_parts(s, node, {0: axis})
    return out, args, kwargs


# -- writes ---------------------------------------------------------------------------------------------------------


def _written(s: Shrink, node: fx.Node, axis: SampleAxis | None, gone: int, part_rank: int) -> Resized:
    """A write of the second argument into a part of the first, ``gone`` dimensions before the samples' selected away."""
    base, value = node.args[:2]
    if axis is None:
        raise mixes(node, "puts them into an array that does not hold them")
    args = [s.operand(base, axis), value, *node.args[2:]]
    if isinstance(value, fx.Node):
        here = axis.moved(-gone + len(shape_of(value)) - part_rank)
        held = s.axis(value)
        if held is not None and held != here:
            raise mixes(node)
        spread = here.dim < 0 or shape_of(value)[here.dim] == 1 < axis.length(s.samples)
        args[1] = s.operand(value, None if spread else here)
    return axis, tuple(args), dict(node.kwargs)


def _scattered(s: Shrink, node: fx.Node) -> tuple[SampleAxis, int]:
    """Return where the result of a scatter into one dimension holds the samples, and that dimension."""
    base, value = node.args[:2]
    dim = int(given(node, "dim")) % len(shape_of(node))
    axis = s.axis(base)  # type: ignore[arg-type]
    held = s.axis(value) if isinstance(value, fx.Node) else None
    if axis is None and held is not None:  # into an array that is the same for all of them, so far
        axis = held.moved(int("select" in str(node.target) and held.dim >= dim))
    if axis is None or axis.dim == dim:
        raise mixes(node, "writes a part of them")
    return axis, dim


@sample_rule(ops.write)
def _write(s: Shrink, node: fx.Node) -> Resized:
    index: tuple[Any, ...] = node.args[2]  # type: ignore[assignment]
    axis = s.axis(node.args[0])  # type: ignore[arg-type]
    if axis is not None and axis.dim < len(index) and index[axis.dim] is not None:
        raise mixes(node, "writes a part of them")
    single = [isinstance(one, (int, fx.Node)) for one in index]
    before = single[: axis.dim] if axis is not None else []
    return _written(s, node, axis, sum(before), len(shape_of(node)) - sum(single))


@sample_rule("select_scatter")
def _select_scatter(s: Shrink, node: fx.Node) -> Resized:
    axis, dim = _scattered(s, node)
    return _written(s, node, axis, int(dim < axis.dim), len(shape_of(node)) - 1)


@sample_rule("slice_scatter")
def _slice_scatter(s: Shrink, node: fx.Node) -> Resized:
    axis, _ = _scattered(s, node)
    return _written(s, node, axis, 0, len(shape_of(node)))
