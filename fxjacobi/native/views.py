"""Selections, transpositions, shapes: other indices into the same elements. Nothing is moved but by ``cat``."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from fxjacobi.native.rules import RULES
from fxjacobi.native.values import Value, at_strides, dense_strides, filled, moved, part_of, remembered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.graph import TensorSpec
    from fxjacobi.native.emitter import Emitter

__all__: list[str] = []


@RULES.register("slice.Tensor")
def _slice(
    emitter: Emitter, spec: TensorSpec, x: Value, dim: int = 0, start: int | None = None, end: int | None = None,
    step: int = 1,
) -> Value:  # fmt: skip
    first = range(x.shape[dim])[start:end:step]
    return part_of(emitter, x, first.start, spec.shape[dim], dim, step)


@RULES.register("select.int")
def _select(emitter: Emitter, _: TensorSpec, x: Value, dim: int, place: int) -> Value:
    return _at_place(emitter, x, dim, place)


def _at_place(emitter: Emitter, x: Value, dim: int, place: int) -> Value:
    dim, place = dim % len(x.shape), place % x.shape[dim]
    shape = (*x.shape[:dim], *x.shape[dim + 1 :])
    return moved(x, shape, lambda index: [*index[:dim], emitter.index(place), *index[dim:]])


@RULES.register("t", "transpose.int", "permute")
def _permute(_: Emitter, spec: TensorSpec, x: Value, *how: Any) -> Value:
    order = list(range(len(x.shape)))
    if how and not isinstance(how[0], int):
        order = [d % len(order) for d in how[0]]
    elif len(order) > 1:
        a, b = how or (0, 1)
        order[a], order[b] = order[b], order[a]
    return moved(x, spec.shape, lambda index: [index[order.index(d)] for d in range(len(order))])


@RULES.register("unsqueeze")
def _unsqueeze(_: Emitter, spec: TensorSpec, x: Value, dim: int) -> Value:
    dim %= len(spec.shape)
    return _reshaped(x, spec, lambda index: [*index[:dim], *index[dim + 1 :]])


@RULES.register("squeeze", "squeeze.dim", "squeeze.dims")
def _squeeze(emitter: Emitter, spec: TensorSpec, x: Value, dims: Any = None) -> Value:
    wanted = range(len(x.shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(x.shape) for d in wanted if x.shape and x.shape[d] == 1}

    def back(index: list[Any]) -> list[Any]:
        rest = iter(index)
        return [emitter.index(0) if d in gone else next(rest) for d in range(len(x.shape))]

    return _reshaped(x, spec, back)


def _reshaped(x: Value, spec: TensorSpec, back: Any) -> Value:
    view = moved(x, spec.shape, back)
    return Value(view.shape, view.dtype, view.at, view.cheap, view.steady, x.pointer, x.split, view.depth)


@RULES.register("expand")
def _expand(emitter: Emitter, spec: TensorSpec, x: Value, *_: Any, **__: Any) -> Value:
    x = x if x.cheap or x.shape == tuple(spec.shape) else remembered(emitter, x)
    new = len(spec.shape) - len(x.shape)
    return moved(
        x, spec.shape,
        lambda index: [emitter.index(0) if n == 1 else i for i, n in zip(index[new:], x.shape, strict=True)],
    )  # fmt: skip


@RULES.register("view.default", "_unsafe_view", "reshape", "_reshape_alias")
def _view(emitter: Emitter, spec: TensorSpec, x: Value, *_: Any) -> Value:
    if tuple(spec.shape) == x.shape:
        return x
    if [n for n in spec.shape if n != 1] == [n for n in x.shape if n != 1]:
        return _reshaped(x, spec, lambda index: _dealt(emitter, index, spec.shape, x.shape))
    x = remembered(emitter, x)
    return at_strides(
        emitter, x.pointer, spec.shape, dense_strides(spec.shape), x.dtype, steady=x.steady, split=x.split
    )


def _dealt(emitter: Emitter, index: list[Any], shape: Sequence[int], onto: Sequence[int]) -> list[Any]:
    """Hand an index's places in dimensions longer than one on to those of another shape."""
    rest = iter([i for i, n in zip(index, shape, strict=True) if n != 1])
    return [emitter.index(0) if n == 1 else next(rest) for n in onto]


@RULES.register("split.Tensor", "split_with_sizes")
def _split(emitter: Emitter, _: Any, x: Value, sizes: Any, dim: int = 0) -> list[Value]:
    if isinstance(sizes, int):
        whole = x.shape[dim]
        sizes = [min(sizes, whole - start) for start in range(0, whole, sizes)]
    starts = itertools.accumulate(sizes, initial=0)
    return [part_of(emitter, x, start, size, dim) for start, size in zip(starts, sizes, strict=False)]


@RULES.register("unbind.int")
def _unbind(emitter: Emitter, _: Any, x: Value, dim: int = 0) -> list[Value]:
    return [_at_place(emitter, x, dim, place) for place in range(x.shape[dim])]


def _cat(emitter: Emitter, spec: TensorSpec, parts: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(spec.shape)
    strides = dense_strides(spec.shape)

    def fill(pointer: Any) -> None:
        start = 0
        for part in parts:
            if math.prod(part.shape) == 0:
                continue
            with emitter.over(part.shape) as index:
                place = emitter.index(start * strides[dim])
                for i, stride in zip(index, strides, strict=True):
                    place = emitter.builder.add(place, emitter.builder.mul(i, emitter.index(stride)))
                emitter.store(emitter.converted(part.at(index), part.dtype, spec.dtype), pointer, place, spec.dtype)
            start += part.shape[dim]

    return filled(emitter, spec.shape, spec.dtype, fill)


RULES.register("cat")(_cat)


@RULES.register("stack")
def _stack(emitter: Emitter, spec: TensorSpec, parts: Sequence[Value], dim: int = 0) -> Value:
    dim %= len(spec.shape)
    rows = [
        moved(p, (*p.shape[:dim], 1, *p.shape[dim:]), lambda index: [*index[:dim], *index[dim + 1 :]]) for p in parts
    ]
    return _cat(emitter, spec, rows, dim)
