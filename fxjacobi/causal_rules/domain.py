"""The two abstract values of the causal-rank analysis, for every element of a tensor.

``rank``   the largest step whose written position the element may depend on (``-1``: none)
``known``  whether the element is a known constant, and ``value``, which

Ranks seldom vary along every dimension (never along the batch, seldom along channels), so rank tensors keep
dimensions along which they are constant at stride 0: :func:`squash` gives them size 1, results are expanded
back, and an analysis at full size costs what one at batch size 1 does. Constancy is a fact of the values, so nothing
about batches has to be assumed.

Masks have millions of entries, and on the CPU ``torch.where``, ``Tensor.any`` and comparisons take 10 to 50 times as long
as arithmetic on the same bytes; :func:`some`, :func:`every`, :func:`without` and :func:`is_value` do the same by arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "NOTHING",
    "Abstract",
    "Value",
    "broadcast",
    "constant",
    "every",
    "nothing",
    "some",
    "squash",
    "squash_equal",
    "unknown",
    "without",
]

NOTHING = -1
"""The rank of an element that depends on no written position."""

_NOTHING = torch.tensor(NOTHING, dtype=torch.int32)
_TRUE = torch.tensor(True)


@dataclass(frozen=True, slots=True, eq=False)
class Abstract:
    """What is known of a tensor, element by element.

    Args:
        rank: ``int32`` on the CPU, of the tensor's shape; ``-1`` wherever ``known``.
        known: ``bool`` on the CPU, of the tensor's shape, or ``None`` when no element is known.
        value: The tensor's dtype and shape, on its own device, meaningful where ``known``.
        sources: Names of the constants that ``known`` and ``value`` rest on.
    """

    rank: torch.Tensor
    known: torch.Tensor | None = None
    value: torch.Tensor | None = None
    sources: frozenset[str] = frozenset()
    found: dict[float, torch.Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(self.rank.shape)

    @property
    def constant(self) -> bool:
        """Whether every element is known."""
        return self.known is not None and every(squash(self.known))

    @property
    def highest(self) -> int:
        """The largest rank of any element (``-1`` for a tensor without elements)."""
        return int(squash(self.rank).max()) if self.rank.numel() else NOTHING

    def equals(self, value: float) -> torch.Tensor | None:
        """Where the element is known to be ``value`` (``None``: nowhere)."""
        if self.known is None or self.value is None:
            return None
        if value not in self.found:
            found = squash(self.known) & is_value(squash(self.value), value).cpu()
            self.found[value] = found.expand(self.shape) if some(found) else None
        return self.found[value]


Value: TypeAlias = "Abstract | tuple[Value, ...] | object"
"""A node's abstract value: a tensor's, several, or a Python value as it is."""


def squash(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` with size 1 along every dimension of stride 0 (a view)."""
    strides = tensor.stride()
    if 0 not in strides or tensor.numel() == 0:
        return tensor
    sizes = [1 if stride == 0 else size for size, stride in zip(tensor.shape, strides, strict=True)]
    return tensor.as_strided(sizes, strides)


def some(mask: torch.Tensor) -> bool:
    """Whether any element of a ``bool`` tensor is true."""
    return mask.numel() > 0 and bool(mask.view(torch.uint8).amax())


def every(mask: torch.Tensor) -> bool:
    """Whether all elements of a ``bool`` tensor are true."""
    return mask.numel() == 0 or bool(mask.view(torch.uint8).amin())


def without(rank: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """Return ``where(dead, -1, rank)``, broadcast."""
    if rank.numel() == 1 and rank.dim() <= dead.dim() and int(rank) == NOTHING:
        return nothing(dead.shape)
    return (rank - NOTHING) * ~dead + NOTHING


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that ``shapes`` broadcast to; ``torch.broadcast_shapes`` imports sympy, which takes 0.2 s."""
    dims = max(len(shape) for shape in shapes)
    padded = [(*[1] * (dims - len(shape)), *shape) for shape in shapes]
    return tuple(next((size for size in sizes if size != 1), 1) for sizes in zip(*padded, strict=True))


def is_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    """Return ``tensor == value``."""
    return ~tensor.to(torch.bool) if value == 0 else tensor == value


def squash_equal(tensor: torch.Tensor, dims: Iterable[int] | None = None) -> torch.Tensor:
    """Return an equal tensor with stride 0 along every dimension (of ``dims``) along which the values are all equal."""
    shape = tensor.shape
    if tensor.numel() == 0:
        return tensor
    tensor = squash(tensor)
    for dim in range(tensor.dim()) if dims is None else dims:
        if tensor.shape[dim] > 1:
            first = tensor.narrow(dim, 0, 1)
            if every(tensor == first):
                tensor = first
    return tensor.expand(shape)


def unknown(shape: Sequence[int], rank: int = NOTHING) -> Abstract:
    """Return a tensor of which nothing is known but one rank for all elements."""
    return Abstract(nothing(shape) if rank == NOTHING else torch.tensor(rank, dtype=torch.int32).expand(tuple(shape)))


def nothing(shape: Sequence[int]) -> torch.Tensor:
    """Return the ranks of a tensor that depends on no written position."""
    return _NOTHING.expand(tuple(shape))


def constant(value: torch.Tensor, source: str | None = None) -> Abstract:
    """Return a tensor known in full, from the constant named ``source`` (or from the program itself)."""
    shape = tuple(value.shape)
    return Abstract(
        nothing(shape),
        _TRUE.expand(shape),
        value.detach(),
        frozenset() if source is None else frozenset({source}),
    )
