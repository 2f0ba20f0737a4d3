"""Tensors inside a step: functions from an index to an element, most of them never in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from fxjacobi.native.emitter import Emitter, NoMachineFormError, NotSplitError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = ["Value", "at_strides", "constant", "dense_strides", "filled", "moved", "part_of", "place_of", "remembered"]

Index: TypeAlias = "list[Any]"


@dataclass(frozen=True)
class Value:
    """A tensor of one step.

    Args:
        shape: Its shape.
        dtype: Its dtype.
        at: Writes what computes the element at an index, and returns it.
        cheap: Whether that is no more than a load.
        steady: Whether it can be written before the loop over the steps, where it is the same.
        pointer: Where its elements lie side by side, row-major; ``None`` where they do not.
        split: Whether there they are of some samples alone.
        depth: Operations that are fused into :attr:`at`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    at: Callable[[Index], Any]
    cheap: bool
    steady: bool
    pointer: Any = None
    split: bool = False
    depth: int = 0


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a row-major tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def at_strides(
    emitter: Emitter,
    pointer: Any,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    *,
    steady: bool = False,
    split: bool = False,
) -> Value:
    """Return the tensor whose element ``(i, j, ..)`` lies at ``pointer + i s_0 + j s_1 + ..``.

    With ``split`` it holds some samples alone, and whoever reads it must be of these.
    """
    sizes = tuple(shape)
    if split and not emitter.splits(sizes):
        raise NotSplitError("samples are joined with another dimension")
    dense = all(n == 1 or s == d for n, s, d in zip(shape, strides, dense_strides(shape), strict=True))

    def at(index: Index) -> Any:
        if split:
            emitter.check_own(index[0])
        return emitter.load(pointer, _dot(emitter, index, sizes, strides), dtype)

    return Value(sizes, dtype, at, True, steady, pointer if dense else None, split)


def constant(emitter: Emitter, value: float, shape: Sequence[int], dtype: torch.dtype) -> Value:
    """Return a tensor of equal elements that are known now."""
    return Value(tuple(shape), dtype, lambda _: emitter.number(value, dtype), True, True)


def moved(value: Value, shape: Sequence[int], back: Callable[[Index], Index]) -> Value:
    """Return the view of ``shape`` whose element at an index is that of ``value`` at ``back(index)``."""
    return Value(
        tuple(shape), value.dtype, lambda index: value.at(back(index)), value.cheap, value.steady, depth=value.depth
    )


def part_of(emitter: Emitter, x: Value, start: int, size: int, dim: int = 0, step: int = 1) -> Value:
    """Return ``size`` of the places along a dimension, from ``start`` on."""
    dim %= len(x.shape)

    def back(index: Index) -> Index:
        at = index[dim]
        if step != 1:
            at = emitter.builder.mul(at, emitter.index(step), flags=("nsw",))
        if start:
            at = emitter.builder.add(at, emitter.index(start), flags=("nsw",))
        return [*index[:dim], at, *index[dim + 1 :]]

    return moved(x, (*x.shape[:dim], size, *x.shape[dim + 1 :]), back)


def remembered(emitter: Emitter, value: Value) -> Value:
    """Return the value in memory, row-major."""
    if value.pointer is not None:
        return value

    def fill(pointer: Any) -> None:
        with emitter.over(value.shape) as index:
            emitter.store(value.at(index), pointer, place_of(emitter, index, value.shape), value.dtype)

    return filled(emitter, value.shape, value.dtype, fill)


def filled(emitter: Emitter, shape: Sequence[int], dtype: torch.dtype, fill: Callable[[Any], None]) -> Value:
    """Return a tensor in new memory that ``fill(pointer)`` writes."""
    count = math.prod(shape)
    if count == 0:
        raise NoMachineFormError("a tensor without elements")
    pointer, split = emitter.scratch(count, dtype), emitter.splits(shape)
    with emitter.whole(but=split):
        fill(pointer)
    return at_strides(emitter, pointer, shape, dense_strides(shape), dtype, split=split)


def place_of(emitter: Emitter, index: Index, shape: Sequence[int]) -> Any:
    """Return where the element at an index lies in a row-major tensor."""
    return _dot(emitter, index, shape, dense_strides(shape))


def _dot(emitter: Emitter, index: Index, shape: Sequence[int], strides: Sequence[int]) -> Any:
    offset = emitter.index(0)
    for i, size, stride in zip(index, shape, strides, strict=True):
        if size > 1 and stride:
            term = i if stride == 1 else emitter.builder.mul(i, emitter.index(stride), flags=("nsw",))
            offset = emitter.builder.add(offset, term, flags=("nsw",))
    return offset
