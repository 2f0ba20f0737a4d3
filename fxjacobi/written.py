"""All the writes of a loop into one array, done at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Places", "write_steps"]

Places: TypeAlias = "tuple[Sequence[int] | tuple[tuple[int, int, int], ...] | None, ...]"
"""One entry a leading dimension: ``None`` takes all of it, ``T`` ints select one index a step, ``T`` triples slice."""


def _offsets(place: Sequence[int] | tuple[tuple[int, int, int], ...], size: int) -> torch.Tensor:
    """Return the positions written along one dimension, ``(T, L)``."""
    rows = [
        [p % size if -size <= p < size else p] if isinstance(p, int) else list(range(*slice(*p).indices(size)))
        for p in place
    ]
    return torch.tensor(rows, dtype=torch.int64)


def write_steps(base: torch.Tensor, values: torch.Tensor, places: Places) -> torch.Tensor:
    """Return ``base`` after ``base[places at t] = values[t]`` for ``t = 0 .. T-1``, in that order.

    ``values`` is ``(T, ...)``, each of the shape of the part that it is written to. Where places overlap, the later
    step wins. An element is copied or left alone, never computed, so the result is exactly the loop's.

    Raises:
        IndexError: A place lies outside ``base``.
    """
    steps = values.shape[0]
    dims = [dim for dim, place in enumerate(places) if place is not None]
    others = [dim for dim in range(base.dim()) if dim not in dims]
    if not dims:
        return base.clone().copy_(values[-1])
    only = places[dims[0]]
    if (
        len(dims) == 1
        and isinstance(only, range)
        and only.step > 0
        and only.start >= 0
        and only.stop <= base.shape[dims[0]]
    ):
        result = base.clone()
        result.movedim(dims[0], 0)[only.start : only.stop : only.step] = values
        return result
    offsets = []
    for dim in dims:
        place = places[dim]
        assert place is not None
        offsets.append(_offsets(place, base.shape[dim]))
    # Dimensions that an int selects are absent from the values; put them back, then bring the written ones forward.
    for dim in dims:
        place = places[dim]
        if place is not None and isinstance(place[0], int):
            values = values.unsqueeze(dim + 1)
    order = [0, *(dim + 1 for dim in dims), *(dim + 1 for dim in others)]
    values = values.permute(order).flatten(0, len(dims)).to(base.dtype)

    linear = torch.zeros((steps, *[1] * len(dims)), dtype=torch.int64)
    for i, (dim, offset) in enumerate(zip(dims, offsets, strict=True)):
        if offset.numel() and (int(offset.min()) < 0 or int(offset.max()) >= base.shape[dim]):
            raise IndexError(f"a place lies outside dimension {dim} of size {base.shape[dim]}")
        shape = [steps, *[1] * len(dims)]
        shape[i + 1] = offset.shape[1]
        linear = linear * base.shape[dim] + offset.view(shape)
    linear = linear.flatten()
    # Of several writes to one place the last is kept: sort by place, then by time.
    sorted_places, by_place = torch.sort(linear, stable=True)
    last = torch.ones_like(sorted_places, dtype=torch.bool)
    last[:-1] = sorted_places[1:] != sorted_places[:-1]
    if not bool(last.all()):
        kept = by_place[last]
        linear, values = linear[kept], values.index_select(0, kept.to(values.device))

    result = base.clone()
    part = result.permute([*dims, *others])
    indices, rest = [], linear
    for dim in reversed(dims):
        indices.append(rest % base.shape[dim])
        rest = rest // base.shape[dim]
    whole = math.prod(base.shape[dim] for dim in dims)
    assert linear.numel() <= whole
    part[tuple(index.to(base.device) for index in reversed(indices))] = values
    return result
