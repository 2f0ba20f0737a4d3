"""Operations that only move elements: the same operation, applied to the ranks."""

# ruff: noqa: ARG001 - rules share one signature

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from fxjacobi import ops
from fxjacobi.causal_rules.domain import NOTHING, Abstract, Value, constant, nothing, some, squash, squash_equal
from fxjacobi.causal_rules.registry import Context, rule, tensors_in
from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.rule_table import overloads

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

__all__ = ["MOVES", "RESHAPES", "VIEWS", "joined", "moved", "reshaped"]

aten = torch.ops.aten

_SHAPE = overloads(
    "view.default", "_unsafe_view", "reshape", "view_copy.default", "_reshape_alias", "flatten.using_ints"
)
_SINGLE = overloads(
    "expand", "expand_as", "permute", "transpose.int", "t", "squeeze", "unsqueeze", "slice.Tensor", "select.int", "narrow",
    "unfold", "diagonal", "movedim", "swapaxes", "mT", "unflatten.int", "broadcast_to", "permute_copy", "transpose_copy.int",
    "expand_copy", "slice_copy.Tensor", "select_copy.int", "squeeze_copy", "unsqueeze_copy", "t_copy",
)  # fmt: skip
_SEVERAL = overloads(
    "split", "split_with_sizes", "unbind.int", "chunk", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk",
    "tensor_split", "split_copy", "split_with_sizes_copy", "unbind_copy.int",
)  # fmt: skip

RESHAPES: frozenset[object] = frozenset(_SHAPE)
"""Views that keep the elements' order and say their shape."""

VIEWS: frozenset[object] = frozenset([*_SHAPE, *_SINGLE, *_SEVERAL, operator.getitem])
"""Operations whose result is a selection of the elements of their first argument, fixed by the other arguments."""

_REORDERS = overloads(
    "flip", "roll", "repeat", "repeat_interleave.self_int", "tile", "pixel_shuffle", "pixel_unshuffle"
)
_REORDERS += overloads("rot90", "channel_shuffle", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")
_REORDERS += overloads("reflection_pad1d", "reflection_pad2d", "reflection_pad3d")
_REORDERS += overloads("replication_pad1d", "replication_pad2d", "replication_pad3d", "im2col")

MOVES: frozenset[object] = VIEWS | frozenset(_REORDERS)


def moved(operation: Callable[[torch.Tensor], Any], base: Abstract) -> Any:
    """Apply a movement of elements to ranks, knowledge and values; several results give a tuple."""
    ranks = operation(base.rank)
    if base.known is None or base.value is None:
        if isinstance(ranks, torch.Tensor):
            return Abstract(ranks)
        return tuple(Abstract(rank) for rank in ranks)
    knowns, values = operation(base.known), operation(base.value)
    if isinstance(ranks, torch.Tensor):
        return Abstract(ranks, knowns, values, base.sources)
    return tuple(
        Abstract(rank, known, value, base.sources) for rank, known, value in zip(ranks, knowns, values, strict=True)
    )


def reshaped(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Reshape, keeping stride 0 along dimensions that become others of stride 0 alone: a batch, merged with heads."""
    old = tuple(tensor.shape)
    if tensor.numel() == 0:
        return tensor.reshape(shape)
    small, sizes = tensor, []
    for first, last, begin, end in _groups(old, shape):
        if all(old[dim] == 1 or tensor.stride(dim) == 0 for dim in range(first, last)):
            for dim in range(first, last):
                small = small.narrow(dim, 0, 1)
            sizes += [1] * (end - begin)
        else:
            sizes += shape[begin:end]
    return small.reshape(sizes).expand(shape)


_WORTH_A_LOOK = 1 << 18
"""Ranks, beyond which comparing them costs more than carrying them along may."""


def _groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Return the finest pairs of runs of dimensions, ``old[a:b]`` and ``new[c:d]``, of as many elements each."""
    found = []
    i = j = 0
    while i < len(old) or j < len(new):
        first, begin, left, right = i, j, 1, 1
        if i < len(old):
            left, i = left * old[i], i + 1
        if j < len(new):
            right, j = right * new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        found.append((first, i, begin, j))
    return found


@rule(*_SHAPE)
def _reshape(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y) = reshape(r(x))``."""
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    result: Abstract = moved(lambda tensor: reshaped(tensor, spec.shape), args[0])
    return Abstract(_split(args[0].shape, result.rank), result.known, result.value, result.sources)


def _split(old: tuple[int, ...], rank: torch.Tensor) -> torch.Tensor:
    """Give stride 0 back to a batch that was merged with positions and is now apart again: its ranks are all equal."""
    if squash(rank).numel() > _WORTH_A_LOOK:
        return rank
    for first, last, begin, end in _groups(old, tuple(rank.shape)):
        if last - first == 1 and end - begin > 1:
            rank = squash_equal(rank, range(begin, end))
    return rank


def _as_float(target: object, tensor: torch.Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Run an operation that has no kernel for integers and bools on exact float64 copies of them."""
    assert callable(target)
    if tensor.is_floating_point():
        found: torch.Tensor = target(tensor, *rest, **kwargs)
        return found
    copied: torch.Tensor = target(tensor.to(torch.float64), *rest, **kwargs)
    return copied.to(tensor.dtype)


@rule(*_SINGLE, *_SEVERAL)
def _move(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y) = view(r(x))``: the operation itself, run on ranks, knowledge and values."""
    if len(tensors_in((args, kwargs))) != 1:
        plain = tree_map(lambda item: item.rank if isinstance(item, Abstract) else item, args[1:])
        result: Value = moved(lambda tensor: node.target(tensor, *plain, **kwargs), args[0])  # type: ignore[operator]
        return result
    found: Value = moved(lambda tensor: node.target(tensor, *args[1:], **kwargs), args[0])  # type: ignore[operator]
    return found


@rule(*_REORDERS)
def _reorder(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y) = operation(r(x))`` for operations that copy elements to other places."""
    result: Value = moved(lambda tensor: _as_float(node.target, tensor, args[1:], kwargs), args[0])
    return result


@rule(operator.getitem)
def _getitem(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """One result of several."""
    result: Value = args[0][args[1]]
    return result


@rule(ops.restride)
def _restride(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y) = r(x)``: only the layout changes."""
    value: Value = args[0]
    return value


def joined(tensors: list[Abstract], join: Callable[[list[torch.Tensor]], torch.Tensor], dtype: torch.dtype) -> Abstract:
    """Apply an operation that puts several tensors into one."""
    rank = join([tensor.rank for tensor in tensors])
    if all(tensor.known is None for tensor in tensors):
        return Abstract(rank)
    device = next(tensor.value.device for tensor in tensors if tensor.value is not None)
    known, value = [], []
    for tensor in tensors:
        shape = tensor.shape
        known.append(torch.tensor(False).expand(shape) if tensor.known is None else tensor.known)
        blank = torch.zeros((), dtype=dtype, device=device).expand(shape)
        value.append(blank if tensor.value is None else tensor.value.to(dtype))
    sources = frozenset().union(*(tensor.sources for tensor in tensors))
    return Abstract(rank, join(known), join(value), sources)


@rule("cat", "concat", "stack")
def _cat(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y) = cat(r(x_1), ..., r(x_n))``."""
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    # cat skips empty one-dimensional tensors of any neighbour's shape, an old exception of its own.
    tensors = [tensor for tensor in args[0] if tensor.shape != (0,) or spec.shape == (0,)]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    join = torch.stack if node.target in overloads("stack") else torch.cat
    dim = dim % len(spec.shape)

    def along(items: list[torch.Tensor]) -> torch.Tensor:
        """Join after squashing every dimension but ``dim`` that is squashed in all items."""
        if join is torch.stack:
            items = [item.unsqueeze(dim) for item in items]
        shape = spec.shape
        for other in range(len(shape)):
            if other != dim and all(item.stride(other) == 0 for item in items):
                items = [item.narrow(other, 0, 1) if item.shape[other] > 1 else item for item in items]
        return torch.cat(items, dim).expand(shape)

    return joined(tensors, along, spec.dtype)


def _padded(base: torch.Tensor, pad: list[int], fill: float) -> torch.Tensor:
    found: torch.Tensor = aten.constant_pad_nd(base, pad, fill)
    return found


@rule("constant_pad_nd", "pad")
def _pad(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y) = pad(r(x), -1)``; a constant border is known."""
    base, pad = args[0], list(args[1])
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    if node.target in overloads("pad"):
        mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
        if mode != "constant":
            result: Value = moved(lambda tensor: _as_float(node.target, tensor, args[1:], kwargs), base)
            return result
        fill = args[3] if len(args) > 3 else kwargs.get("value")
        fill = 0 if fill is None else fill
    else:
        fill = args[2] if len(args) > 2 else kwargs.get("value", 0)

    def small(tensor: torch.Tensor, value: float) -> torch.Tensor:
        """Pad after squashing the dimensions that are not padded."""
        padded_dims = {tensor.dim() - 1 - i // 2 for i, amount in enumerate(pad) if amount}
        for dim in range(tensor.dim()):
            if dim not in padded_dims and tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
        return _padded(tensor, pad, value).expand(spec.shape)

    rank = small(base.rank, NOTHING)
    if base.known is None or base.value is None:
        known = ~small(torch.ones((), dtype=torch.bool).expand(base.shape), False)
        value = torch.full((), fill, dtype=spec.dtype).expand(spec.shape)
        return Abstract(rank, known, value) if some(squash(known)) else Abstract(rank)
    return Abstract(rank, small(base.known, True), small(base.value, fill), base.sources)


@rule("tril", "triu")
def _triangle(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y) = r(x)`` inside the triangle; outside it is a known 0."""
    base = args[0]
    diagonal = args[1] if len(args) > 1 else kwargs.get("diagonal", 0)
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    assert callable(node.target)
    inside = node.target(torch.ones(spec.shape[-2:], dtype=torch.bool), diagonal).expand(spec.shape)
    rank = torch.where(inside, base.rank, NOTHING)
    known = ~inside if base.known is None else ~inside | base.known
    if base.value is None:
        return Abstract(rank, known, torch.zeros((), dtype=spec.dtype).expand(spec.shape))
    value = node.target(base.value, diagonal)
    return Abstract(rank, known, value, base.sources)


@rule("select_scatter", "slice_scatter", "diagonal_scatter")
def _scatter_view(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y) = scatter(r(x), r(src))``."""
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    assert callable(node.target)
    target = node.target
    return joined(list(args[:2]), lambda pair: target(pair[0], pair[1], *args[2:], **kwargs), spec.dtype)


@rule(ops.write)
def _write(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y) = write(r(x), r(value), index)``."""
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    return joined(list(args[:2]), lambda pair: ops.write(pair[0], pair[1], args[2]), spec.dtype)


_CREATORS = overloads(
    "zeros", "ones", "full", "arange", "eye", "scalar_tensor", "linspace", "logspace", "tril_indices", "triu_indices",
)  # fmt: skip
_LIKE = overloads("zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "fill.Scalar")


@rule(*_CREATORS)
def _create(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Known in full."""
    if tensors_in((args, kwargs)):
        return context.give_up(node, args, kwargs)
    assert callable(node.target)
    return constant(node.target(*args, **kwargs))


@rule(*_LIKE)
def _create_like(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Known in full: only the shape of the argument counts."""
    if len(tensors_in((args, kwargs))) != 1:
        return context.give_up(node, args, kwargs)
    source = node.args[0]
    spec = spec_of(source)  # type: ignore[arg-type]
    assert isinstance(spec, TensorSpec)
    assert callable(node.target)
    blank = torch.zeros((), dtype=spec.dtype, device=spec.device).expand(spec.shape)
    return constant(node.target(blank, *args[1:], **kwargs))


@rule("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
def _empty(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Whatever lies in memory: nothing that was written, and nothing known."""
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    return Abstract(nothing(spec.shape))
