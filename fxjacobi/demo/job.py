"""What one job of the demo hands back: both results, both times, and how the solve went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fxjacobi.bits import Difference
    from fxjacobi.plan import Plan

__all__ = ["DemoError", "Outcome"]


class DemoError(Exception):
    """The demo cannot run here; the message says what to install."""


@dataclass(frozen=True)
class Outcome:
    """One job, done both ways.

    Args:
        title: What it was.
        plan: The compiled model's plan.
        equations: Equations of the largest block: passes or steps of the ordinary run.
        sweeps: Sweeps that solved them.
        ordinary: Result of the ordinary run, ``(N, 28, 28)``.
        solved: Result of the compiled model, ``(N, 28, 28)``.
        difference: Where the two differ, or ``None`` where every element is equal.
        final_at: For each element, the sweep after which it never changed again, ``(N, 28, 28)``.
        ordinary_s: Median seconds of the ordinary run.
        first_s: Seconds of the compiled model's first call, which records the ordinary run and compiles it.
        solved_s: Median seconds of later calls.
    """

    title: str
    plan: Plan
    equations: int
    sweeps: int
    ordinary: torch.Tensor
    solved: torch.Tensor
    difference: Difference | None
    final_at: torch.Tensor
    ordinary_s: float
    first_s: float
    solved_s: float
