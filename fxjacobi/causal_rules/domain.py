"""The two abstract values of the causal-rank analysis, for every element of a tensor.

``rank``   the largest step whose written position the element may depend on (``-1``: none)
``known``  whether the element is a known constant, and ``value``, which

Ranks seldom vary along every dimension (never along the batch, seldom along channels), so rank tensors keep
dimensions along which they are constant at stride 0: :func:`squash` gives them size 1, results are expanded
back, and an analysis at full size costs what one at batch size 1 does. Constancy is a fact of the values, so nothing
about batches has to be assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NOTHING", "Abstract", "Value", "constant", "squash", "squash_equal", "unknown"]

NOTHING = -1
"""The rank of an element that depends on no written position."""


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

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(self.rank.shape)

    @property
    def constant(self) -> bool:
        """Whether every element is known."""
        return self.known is not None and bool(squash(self.known).all())

    @property
    def highest(self) -> int:
        """The largest rank of any element (``-1`` for a tensor without elements)."""
        return int(squash(self.rank).max()) if self.rank.numel() else NOTHING

    def equals(self, value: float) -> torch.Tensor | None:
        """Where the element is known to be ``value`` (``None``: nowhere)."""
        if self.known is None or self.value is None:
            return None
        found = squash_broadcast(torch.logical_and, squash(self.known), (squash(self.value) == value).cpu(), self.shape)
        return found if bool(squash(found).any()) else None


Value: TypeAlias = "Abstract | tuple[Value, ...] | object"
"""A node's abstract value: a tensor's, several, or a Python value as it is."""


def squash(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` with size 1 along every dimension of stride 0 (a view)."""
    if tensor.numel() == 0:
        return tensor
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def squash_broadcast(function: object, left: torch.Tensor, right: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Apply a pointwise function of two squashed tensors and expand the outcome to ``shape``."""
    assert callable(function)
    result: torch.Tensor = function(left, right)
    return result.expand(tuple(shape))


def squash_equal(tensor: torch.Tensor) -> torch.Tensor:
    """Return an equal tensor with stride 0 along every dimension along which the values are all equal."""
    shape = tensor.shape
    if tensor.numel() == 0:
        return tensor
    tensor = squash(tensor)
    for dim in range(tensor.dim()):
        if tensor.shape[dim] > 1:
            first = tensor.narrow(dim, 0, 1)
            if bool((tensor == first).all()):
                tensor = first
    return tensor.expand(shape)


def unknown(shape: Sequence[int], rank: int = NOTHING) -> Abstract:
    """Return a tensor of which nothing is known but one rank for all elements."""
    return Abstract(torch.tensor(rank, dtype=torch.int32).expand(tuple(shape)))


def constant(value: torch.Tensor, source: str | None = None) -> Abstract:
    """Return a tensor known in full, from the constant named ``source`` (or from the program itself)."""
    shape = tuple(value.shape)
    return Abstract(
        torch.tensor(NOTHING, dtype=torch.int32).expand(shape),
        torch.tensor(True).expand(shape),
        value.detach(),
        frozenset() if source is None else frozenset({source}),
    )
