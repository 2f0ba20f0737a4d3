"""Specs of tensors that a pass adds to a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxjacobi.errors import PassError
from fxjacobi.graph import Spec, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["contiguous_strides", "dense", "in_one_order", "is_contiguous", "is_packed", "lie_alike", "selected"]


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor of ``shape``."""
    strides: list[int] = []
    size = 1
    for length in reversed(shape):
        strides.append(size)
        size *= max(length, 1)
    return tuple(reversed(strides))


def is_contiguous(spec: Spec) -> bool:
    """Whether ``spec`` is that of a contiguous tensor (dimensions of one element may have any stride)."""
    if not isinstance(spec, TensorSpec):
        return False
    wanted = contiguous_strides(spec.shape)
    return 0 in spec.shape or all(
        length == 1 or stride == want for length, stride, want in zip(spec.shape, spec.stride, wanted, strict=True)
    )


def is_packed(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether strides leave no gap and repeat nothing: a new tensor may have them, in some order of dimensions."""
    dims = sorted((step, size) for size, step in zip(shape, stride, strict=True) if size != 1)
    packed = 1
    for step, size in dims:
        if step != packed:
            return 0 in shape
        packed *= size
    return True


def lie_alike(a: TensorSpec, b: TensorSpec) -> bool:
    """Whether two specs of one shape lay their elements out alike (a dimension of one element may have any stride)."""
    if a.shape != b.shape:
        return False
    return 0 in a.shape or all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride, b.stride, strict=True))


def in_one_order(a: TensorSpec, b: TensorSpec) -> bool:
    """Whether the dimensions of two specs of one shape lie in one order, whatever gaps there are between elements."""

    def order(spec: TensorSpec) -> tuple[list[int], list[bool]]:
        dims = [dim for dim, size in enumerate(spec.shape) if size != 1]
        return sorted(dims, key=lambda dim: -spec.stride[dim]), [spec.stride[dim] == 0 for dim in dims]

    return a.shape == b.shape and order(a) == order(b)


def dense(like: TensorSpec, shape: tuple[int, ...], stride: tuple[int, ...] | None = None) -> TensorSpec:
    """The spec of a tensor of ``like``'s dtype and device; contiguous unless strides are given."""
    return TensorSpec(shape, like.dtype, like.device, contiguous_strides(shape) if stride is None else stride)


def selected(spec: Spec, dim: int) -> TensorSpec:
    """The spec of ``tensor.select(dim, i)``."""
    if not isinstance(spec, TensorSpec):
        raise PassError(f"a select reads {spec}, which is no tensor")
    dim %= len(spec.shape)
    stride = spec.stride[:dim] + spec.stride[dim + 1 :]
    return dense(spec, spec.shape[:dim] + spec.shape[dim + 1 :], stride)
