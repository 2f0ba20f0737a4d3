"""What is known of how large a tensor's elements are: an interval, and norms of its rows.

    low <= x <= high,    ||x[..., :]||_2 <= norm,    ||x[..., :]||_1 <= total

for the values that the kernels compute, rounding and all: :meth:`Interval.rounded` widens exact interval arithmetic by
more than the error bounds of summation (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1) in float32,
in TF32 and bfloat16 products too. It holds for values that are not NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isnan, sqrt
from typing import TYPE_CHECKING

import torch

from fxjacobi.causal_rules.domain import squash

if TYPE_CHECKING:
    from torch import fx

__all__ = ["LARGE", "NORM_SLACK", "Interval", "Rests", "hull", "interval_of_value", "symmetric"]

NORM_SLACK = 1.01
"""Covers the rounding of norms that are themselves computed in float32, over up to a hundred thousand elements."""

LARGE = 64.0
"""Constants with elements beyond this are kept element by element: they may be attention masks."""


@dataclass(frozen=True, slots=True)
class Rests:
    """What an interval rests on.

    Args:
        sources: Names of constants.
        assumed: Nodes that are taken to be within limits: a placeholder's elements, another's rows by Euclidean norm.
    """

    sources: frozenset[str] = frozenset()
    assumed: frozenset[tuple[fx.Node, float]] = frozenset()

    def __or__(self, other: Rests) -> Rests:
        return Rests(self.sources | other.sources, self.assumed | other.assumed)


@dataclass(frozen=True, slots=True, eq=False)
class Interval:
    """See the module's docstring.

    Args:
        low: ``float64`` on the CPU, broadcastable to the tensor's shape, of no dimensions where one number serves.
        high: Likewise.
        norm: Largest Euclidean norm of a row along the last dimension.
        total: Largest sum of magnitudes of a row along the last dimension.
        rests: What it rests on.
    """

    low: torch.Tensor
    high: torch.Tensor
    norm: float = inf
    total: float = inf
    rests: Rests = Rests()

    @property
    def size(self) -> float:
        """The largest magnitude of any element."""
        return max(abs(float(self.low.min())), abs(float(self.high.max())))

    @property
    def one(self) -> Interval:
        """One number for all elements, wherever they lie: nothing of rows."""
        return Interval(self.low.min(), self.high.max(), rests=self.rests)

    def rows(self, length: int) -> tuple[float, float]:
        """Return the norm and the total of rows of ``length`` elements, from the elements where those say more."""
        size = self.size
        return min(self.norm, sqrt(length) * size, self.total), min(self.total, length * size, sqrt(length) * self.norm)

    def rounded(self, dtype: torch.dtype, terms: int = 1) -> Interval:
        """Widen for sums of ``terms`` products, each rounded; past the dtype's range anything may come out."""
        if not dtype.is_floating_point:
            return self
        unit = max(torch.finfo(dtype).eps, 2.0**-40)  # the interval's own arithmetic is rounded too
        slack = 2 * unit if terms == 1 else 0.02 + 4 * terms * 2.0**-24
        # low - slack |low| and high + slack |high|, infinities kept.
        low = self.low.clamp(max=0) * (1 + slack) + self.low.clamp(min=0) * (1 - slack)
        high = self.high.clamp(min=0) * (1 + slack) + self.high.clamp(max=0) * (1 - slack)
        most = torch.finfo(dtype).max
        if float(low.min()) < -most:
            low = torch.where(low < -most, -inf, low)
        if float(high.max()) > most:
            high = torch.where(high > most, inf, high)
        return Interval(low, high, self.norm * (1 + slack), self.total * (1 + slack), self.rests)


def symmetric(size: float, rests: Rests, norm: float = inf, total: float = inf) -> Interval | None:
    """Return ``[-size, size]``, or ``None`` if that says nothing."""
    if size == inf or isnan(size):
        return None
    high = torch.tensor(size, dtype=torch.float64)
    # 0 * inf comes about in products of bounds, and says nothing.
    norm, total = (inf if isnan(one) else one for one in (norm, total))
    return Interval(-high, high, norm, total, rests)


def interval_of_value(value: torch.Tensor, sources: frozenset[str]) -> Interval | None:
    """Return the interval of a known tensor: its elements where they look like a mask, else the smallest and largest."""
    length = value.shape[-1] if value.dim() else 1
    value = squash(value.detach())
    if value.is_complex() or value.is_sparse or value.numel() == 0:
        return None
    low, high = (
        one.to(torch.float64).cpu() for one in torch.aminmax(value if value.dtype != torch.bool else value.int())
    )
    if isnan(float(low)):
        return None
    rests = Rests(sources)
    if max(-float(low), float(high)) > LARGE:
        every = value.to(torch.float64).cpu()
        return Interval(every, every, rests=rests)
    norm = total = inf
    if value.is_floating_point() and value.dim():
        rows, times = value.to(torch.promote_types(value.dtype, torch.float32)), length / value.shape[-1]
        norm = float(rows.norm(dim=-1).max()) * sqrt(times) * NORM_SLACK
        total = float(rows.abs().sum(-1).max()) * times * NORM_SLACK
    return Interval(low, high, norm, total, rests)


def hull(parts: list[Interval]) -> Interval:
    """Return the smallest interval, one number for all elements, that holds all of ``parts``."""
    rests = Rests()
    for part in parts:
        rests |= part.rests
    low = torch.stack([part.low.min() for part in parts]).min()
    high = torch.stack([part.high.max() for part in parts]).max()
    return Interval(low, high, rests=rests)
