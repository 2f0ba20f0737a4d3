"""A block of steps' rows of a scanned operand, at the addresses that a captured graph reads."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.device.operands import static_like
from fxjacobi.device.runner import Refused
from fxjacobi.loops import Scanned, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.device.operands import StaticOperands

__all__ = ["BlockInput", "pace", "places"]


class BlockInput:
    """A block's rows of one scanned operand, or of a table, where the graph reads them.

    The memory has the strides of the operand, and starts as far from an aligned address as the block's rows do.
    """

    def __init__(
        self, binding: Scanned | Table, rows: Sequence[torch.Tensor], whole: torch.Tensor | None = None
    ) -> None:
        self._binding = binding
        self._rows = rows
        self._whole = whole
        self._places: list[int] = []

    @classmethod
    def of(cls, binding: Scanned | Table, operands: StaticOperands, start: int, count: int) -> BlockInput | Refused:
        """Make the memory for blocks of ``count`` steps, the first of which starts at step ``start``."""
        if isinstance(binding, Table):
            rows = [static_like(operands.values[binding.operands[start + row]]) for row in range(count)]
            found = [row for row in rows if row is not None]
            return cls(binding, found) if len(found) == count else Refused("elements of a table's items share memory")
        operand = operands.values[binding.operand]
        at = places(binding, operand)
        if pace(at) == 0:
            return Refused("it scans an operand in uneven steps")
        whole = static_like(_block(operand, binding.dim, at[start : start + count]))
        if whole is None:
            return Refused("elements of a scanned operand share memory")
        order = range(count) if pace(at) > 0 else range(count - 1, -1, -1)
        made = cls(binding, [whole.select(binding.dim, row) for row in order], whole)
        made._places = at
        return made

    def row(self, inner: int) -> torch.Tensor:
        """Return the tensor that the block's step ``inner`` reads."""
        return self._rows[inner]

    def load(self, operands: Sequence[Any], start: int) -> None:
        """Copy the rows of the steps from ``start`` on, on the current stream."""
        count, binding = len(self._rows), self._binding
        if isinstance(binding, Table):
            torch._foreach_copy_(list(self._rows), [operands[binding.operands[start + i]] for i in range(count)])
            return
        assert self._whole is not None
        self._whole.copy_(_block(operands[binding.operand], binding.dim, self._places[start : start + count]))


def places(binding: Scanned, operand: torch.Tensor) -> list[int]:
    """Return the index that each step selects, counted from the front."""
    size = operand.shape[binding.dim]
    return [index % size for index in binding.indices]


def pace(at: Sequence[int]) -> int:
    """Return how far apart the rows of successive steps are, or 0 where that changes."""
    step = at[1] - at[0] if len(at) > 1 else 1
    return step if all(b - a == step for a, b in pairwise(at)) else 0


def _block(operand: torch.Tensor, dim: int, at: Sequence[int]) -> torch.Tensor:
    """Return the rows at evenly spaced ``places`` as a view, in the order of memory."""
    first, last = min(at), max(at)
    every = abs(pace(at)) or 1
    index = (*(slice(None),) * (dim % operand.dim()), slice(first, last + 1, every))
    return operand[index]
