"""Where the samples of a batch lie in a tensor, and how a part of them is taken.

A dimension of a tensor may hold the samples together with other things: ``view(B * L, W)``, or two batches concatenated.
Its index is ``(outer, sample, inner)`` merged, with ``outer * B * inner`` places.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fxjacobi.emit import dense_stride
from fxjacobi.graph import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NotPerSample", "SampleAxis", "axis_of_ids", "resized", "sample_ids", "take"]


class NotPerSample(Exception):  # noqa: N818 - an answer, caught by the caller
    """A program mixes the samples of a batch, or is not known not to; the message says where."""


@dataclass(frozen=True, slots=True)
class SampleAxis:
    """Dimension ``dim`` has the index ``(outer, sample, inner)``, merged.

    Args:
        dim: The dimension, counted from the left.
        outer: How many batches follow one another along it.
        inner: How many places each sample has in a batch.
    """

    dim: int
    outer: int = 1
    inner: int = 1

    def length(self, samples: int) -> int:
        """Return the dimension's size for a batch of ``samples``."""
        return self.outer * samples * self.inner

    def moved(self, by: int) -> SampleAxis:
        """Return the same axis ``by`` dimensions further right."""
        return replace(self, dim=self.dim + by)


def take(value: torch.Tensor, axis: SampleAxis, kept: torch.Tensor, samples: int) -> torch.Tensor:
    """Return ``value`` of ``samples`` samples with those numbered ``kept`` alone, in that order."""
    if axis.outer == axis.inner == 1:
        return value.index_select(axis.dim, kept)
    apart: torch.Tensor = value.unflatten(axis.dim, (axis.outer, samples, axis.inner))
    return apart.index_select(axis.dim + 1, kept).flatten(axis.dim, axis.dim + 2)


def sample_ids(shape: Sequence[int], axis: SampleAxis, samples: int) -> torch.Tensor:
    """Return the number of the sample that each element of a tensor of ``shape`` belongs to."""
    ids = torch.arange(samples).reshape(1, -1, 1).expand(axis.outer, samples, axis.inner).reshape(-1)
    return ids.reshape(-1, *[1] * (len(shape) - axis.dim - 1)).expand(tuple(shape))


def axis_of_ids(ids: torch.Tensor, samples: int) -> SampleAxis | None:
    """Return the axis along which the samples' numbers ``ids`` lie, or ``None`` if they do not lie along one."""
    for dim, size in enumerate(ids.shape):
        if size % samples:
            continue
        line = ids.movedim(dim, -1).reshape(-1, size)[0] if ids.numel() else ids.reshape(-1)
        if not len(line):
            return None
        changes = (line[1:] != line[:-1]).nonzero()
        inner = int(changes[0]) + 1 if len(changes) else size
        if size % (samples * inner):
            continue
        axis = SampleAxis(dim, size // (samples * inner), inner)
        if torch.equal(ids, sample_ids(ids.shape, axis, samples)):
            return axis
    return None


def resized(spec: TensorSpec, axis: SampleAxis, samples: int, fewer: int) -> TensorSpec:
    """Return the spec of a tensor with ``fewer`` in place of ``samples``, laid out as it was.

    Raises:
        NotPerSample: Its dimension is not that long, or its strides do not scale.
    """
    old, new = axis.length(samples), axis.length(fewer)
    if axis.dim >= len(spec.shape) or spec.shape[axis.dim] != old:
        raise NotPerSample(f"a tensor of shape {spec.shape} has no {samples} samples along dimension {axis.dim}")
    shape = (*spec.shape[: axis.dim], new, *spec.shape[axis.dim + 1 :])
    if spec.stride == dense_stride(spec.shape):
        return TensorSpec(shape, spec.dtype, spec.device, dense_stride(shape))
    step = spec.stride[axis.dim]
    stride = []
    for dim, one in enumerate(spec.stride):
        outside = dim != axis.dim and step > 0 and one >= step * old
        if outside and one * new % old:
            raise NotPerSample(f"strides {spec.stride} of shape {spec.shape} do not scale from {samples} to {fewer}")
        stride.append(one * new // old if outside else one)
    return TensorSpec(shape, spec.dtype, spec.device, tuple(stride))
