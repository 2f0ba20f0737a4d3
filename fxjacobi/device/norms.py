"""Updates in units of the tolerance, computed without the host: :mod:`fxjacobi.methods.settle` with masks for branches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fxjacobi.bits import equal_elements

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.methods.method import Contract

__all__ = ["agreement", "distance", "leading_count", "relative"]


def _gap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``|a - b|`` (n, k): 0 where both are equal (NaN too), infinite where only one is finite."""
    apart = torch.where(equal_elements(a, b), 0.0, (a - b).abs())
    return torch.where(torch.isnan(apart), math.inf, apart)


def _size(a: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isfinite(a), a.abs(), 0.0)


def _rows(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(value.shape[0], -1)


def _smooth(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def distance(new: Sequence[torch.Tensor], old: Sequence[torch.Tensor], contract: Contract) -> torch.Tensor:
    """Return for each row the largest ``max |a - b| / (atol + rtol max |a|)`` over the tensors, (n,) float64."""
    ratios = []
    for a, b in zip(new, old, strict=True):
        flat, other = _rows(a), _rows(b)
        if _smooth(a):
            worst, size = _gap(flat, other).amax(1), _size(flat).amax(1)
            ratios.append(torch.where(worst == 0, 0.0, worst / (contract.atol + contract.rtol * size)).double())
        else:
            ratios.append(torch.where((flat == other).all(1), 0.0, math.inf).double())
    return torch.stack(ratios).amax(0)


def leading_count(holds: torch.Tensor) -> torch.Tensor:
    """Return the number of leading entries that are true, as an integer on the device."""
    return holds.to(torch.int64).cumprod(0).sum()


def relative(values: Sequence[torch.Tensor], states: Sequence[torch.Tensor], contract: Contract) -> torch.Tensor:
    """Return the largest ``max |values_t - states_t| / max |values_t|`` over the rows; ``contract`` has ``rtol=1``."""
    return distance(values, states, contract).amax()


def agreement(alone: Sequence[torch.Tensor], batched: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return whether values agree as far as another order of rounding allows, as one bool on the device."""
    holds, sizes = [], []
    root = max((math.sqrt(torch.finfo(v.dtype).eps) for v in alone if _smooth(v)), default=0.0)
    for value in alone:
        if _smooth(value):
            sizes.append(_size(_rows(value.unsqueeze(0))).amax().double())
    bound = torch.stack(sizes).amax() * root if sizes else None
    for a, b in zip(alone, batched, strict=True):
        if _smooth(a) and bound is not None:
            holds.append(_gap(_rows(a.unsqueeze(0)), _rows(b.unsqueeze(0))).amax().double() <= bound)
        else:
            holds.append((a == b).all())
    return torch.stack(holds).all()
