"""The options of :func:`fxjacobi.compile`, validated once and passed everywhere as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxjacobi.methods.guess import Guess

if TYPE_CHECKING:
    from fxjacobi.saved_plan import SavedPlan

__all__ = ["METHODS", "Options"]

METHODS = (
    "auto",
    "sequential",
    "jacobi",
    "windowed",
    "chunked",
    "native",
    "newton",
    "quasi_newton",
    "damped",
    "picard",
    "anderson",
    "affine",
)


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for.

    Args:
        rtol: Relative tolerance of a solve; ``0.0`` (with ``atol=0.0``) is the exact contract.
        atol: Absolute tolerance of a solve.
        method: ``"auto"`` (measured), or the method that every recurrence must use.
        strict: Raise :class:`fxjacobi.CaptureError` where the default is one warning and the ordinary run.
        measure: Keep the emitted module only where it is measured to be faster; ``False`` keeps it always.
        budget_s: Seconds that measuring candidates may take for one specialisation.
        memory_limit: Bytes that a batched sweep may allocate, or ``None`` for what the device has.
        plan: Decisions measured before, which are followed instead of measuring.
        warm_start: Start each block's solve from the solution of the call before.
        guess: Where solves start otherwise; the values before the loop if ``None``.

    Raises:
        ValueError: A tolerance is negative or not finite, the method is unknown, or a limit is not positive.
        TypeError: An option has the wrong type.
    """

    rtol: float = 0.0
    atol: float = 0.0
    method: str = "auto"
    strict: bool = False
    measure: bool = True
    budget_s: float = 2.0
    memory_limit: int | None = None
    plan: SavedPlan | None = None
    warm_start: bool = False
    guess: Guess | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "budget_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, not {type(value).__name__}")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and at least 0, not {value}")
        if not isinstance(self.method, str):
            raise TypeError(f"method must be a string, not {type(self.method).__name__}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        for name in ("strict", "measure", "warm_start"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, not {type(getattr(self, name)).__name__}")
        if self.memory_limit is not None:
            if isinstance(self.memory_limit, bool) or not isinstance(self.memory_limit, int):
                raise TypeError(f"memory_limit must be an int or None, not {type(self.memory_limit).__name__}")
            if self.memory_limit <= 0:
                raise ValueError(f"memory_limit must be positive, not {self.memory_limit}")
        if self.guess is not None and not isinstance(self.guess, Guess):
            raise TypeError(f"guess must be a fxjacobi.methods.Guess or None, not {type(self.guess).__name__}")

    @property
    def exact(self) -> bool:
        """Whether the contract is bit-for-bit equality."""
        return self.rtol == 0 and self.atol == 0
