"""The outcome of trying one way of running an operation: how long it takes, and whether its values are the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.bits import bits_of
from fxjacobi.timing import started

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxjacobi.operation import Way

__all__ = ["MISFITS", "Choice", "Trial", "Unmeasurable", "same_values", "seconds_of"]

_LONG_S = 0.2

# What an operation raises that cannot run on the data or in the shape it is given; anything else is a defect.
MISFITS = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Trial:
    """One way of one operation, measured: seconds of one batched call, and whether it may be used."""

    way: Way
    seconds: float
    equal: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The way taken for one node of the body, with all that were tried."""

    node: str
    operation: str
    way: Way
    trials: tuple[Trial, ...]


class Unmeasurable(Exception):  # noqa: N818 - control flow: the map stays a loop, with this reason
    """The body cannot be run on random data, or not within the memory allowed."""


def same_values(found: Any, wanted: Any, *, exact: bool) -> bool:
    """Whether ``found`` is ``wanted``: in every bit (any NaN is any other), or up to another order of rounding."""
    if isinstance(wanted, (tuple, list)):
        return len(found) == len(wanted) and all(
            same_values(f, w, exact=exact) for f, w in zip(found, wanted, strict=True)
        )
    if not isinstance(wanted, torch.Tensor):
        return bool(found == wanted)
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    inexact = wanted.is_floating_point() or wanted.is_complex()
    if exact or not inexact:
        if torch.equal(bits_of(found), bits_of(wanted)):
            return True
        if not inexact:
            return False
        a, b = (torch.view_as_real(v) if v.is_complex() else v for v in (found.resolve_conj(), wanted.resolve_conj()))
        return bool(((bits_of(a) == bits_of(b)) | (a.isnan() & b.isnan())).all())
    # Intermediate overflow may differ with the order; only finite elements tell a wrong way from a rounded one.
    finite = found.isfinite() & wanted.isfinite()
    a, b = found[finite], wanted[finite]
    scale = float(b.abs().max()) if b.numel() else 0.0
    bound = math.sqrt(torch.finfo(wanted.dtype).eps) * max(scale, 1.0)
    return bool(((a - b).abs() <= bound).all()) and 2 * int(finite.sum()) >= int(wanted.isfinite().sum())


def seconds_of(run: Callable[[], Any]) -> float:
    """Return the shortest wall time of three runs, or of fewer long ones: other work only makes runs longer."""
    best, spent = math.inf, 0.0
    for _ in range(3):
        clock = started()
        run()
        elapsed = clock()
        best, spent = min(best, elapsed), spent + elapsed
        if spent > _LONG_S:
            break
    return best
