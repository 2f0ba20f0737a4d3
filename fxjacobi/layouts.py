"""Specs of tensors that a pass adds to a graph."""

from __future__ import annotations

from fxjacobi.errors import PassError
from fxjacobi.graph import Spec, TensorSpec

__all__ = ["contiguous_strides", "dense", "is_contiguous", "selected"]


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
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
