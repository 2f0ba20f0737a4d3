"""Reading and writing the elements that each step takes of a tensor: as one strided view, where they form a lattice.

    positions[t, i, j, ..] = offset + t s_0 + i s_1 + j s_2 + ..    ->    x.as_strided((T, ..), (s_0, s_1, ..), offset)

A copy of a strided view takes half the time of a gather and a fifth of that of a scatter by index (measured: 78,400
elements of 4 bytes, two threads). Positions in another order, a permutation of the steps, are taken by index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Places", "places"]


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """The elements of a flattened tensor that each of T steps takes.

    Args:
        positions: ``(T, *shape)`` indices.
        offset: The first of them.
        strides: The lattice's strides, ``None`` where they form none.
    """

    positions: torch.Tensor
    offset: int
    strides: tuple[int, ...] | None

    def read(self, source: torch.Tensor, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the steps from ``start`` to ``stop`` take of ``source``, dense, in memory of its own or in ``out``."""
        flat = source.reshape(-1)
        if out is None:
            out = torch.empty((stop - start, *self.positions.shape[1:]), dtype=source.dtype, device=source.device)
        if self.strides is not None:
            return out.copy_(self._view(flat, start, stop))
        torch.index_select(flat, 0, self.positions[start:stop].reshape(-1), out=out.view(-1))
        return out

    def write(self, flat: torch.Tensor, start: int, value: torch.Tensor) -> None:
        """Write ``value`` ``(steps, ...)`` to the places of the steps from ``start`` on; no two places may be the same."""
        stop = start + len(value)
        shape = (len(value), *self.positions.shape[1:])
        if self.strides is not None:
            self._view(flat, start, stop).copy_(value.reshape(shape))
        else:
            flat.scatter_(0, self.positions[start:stop].reshape(-1), value.reshape(-1))

    def _view(self, flat: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        assert self.strides is not None
        step = flat.stride(0)  # of a column of a larger tensor, seen flat
        first = self.offset + (start * self.strides[0] if stop > start else 0)
        strides = [step * stride for stride in self.strides]
        shape = (stop - start, *self.positions.shape[1:])
        return flat.as_strided(shape, strides, flat.storage_offset() + step * first)


def places(positions: torch.Tensor) -> Places:
    """Return ``(T, *shape)`` indices as :class:`Places`."""
    if not positions.numel():
        return Places(positions, 0, None)
    offset = int(positions.reshape(-1)[0])
    strides = tuple(_stride(positions, dim, offset) for dim in range(positions.dim()))
    lattice = min(strides) >= 0 and bool(
        (positions == _lattice(positions.shape, strides, offset, positions.device)).all()
    )
    return Places(positions, offset, strides if lattice else None)


def _stride(positions: torch.Tensor, dim: int, offset: int) -> int:
    if positions.shape[dim] == 1:
        return 0
    return int(positions[(*[0] * dim, 1, *[0] * (positions.dim() - dim - 1))]) - offset


def _lattice(shape: Sequence[int], strides: Sequence[int], offset: int, device: torch.device) -> torch.Tensor:
    total = torch.full((), offset, dtype=torch.int64, device=device)
    for dim, (size, stride) in enumerate(zip(shape, strides, strict=True)):
        line = torch.arange(size, device=device) * stride
        total = total + line.reshape(-1, *[1] * (len(shape) - dim - 1))
    return total
