"""For tests of programs under fxjacobi: generated programs, and assertions of exact equality.

``programs`` needs Hypothesis (the extra ``test``); the assertions need nothing beside torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxjacobi.bits import ulp_distance
from fxjacobi.testing.assertions import Outcome, assert_equal_bits, assert_equivalent, run
from fxjacobi.testing.program import Argument, Layout, Program

if TYPE_CHECKING:
    from fxjacobi.testing.strategies import programs

__all__ = [
    "Argument",
    "Layout",
    "Outcome",
    "Program",
    "assert_equal_bits",
    "assert_equivalent",
    "programs",
    "run",
    "ulp_distance",
]


def __getattr__(name: str) -> Any:
    if name != "programs":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from fxjacobi.testing.strategies import programs
    except ModuleNotFoundError as missing:
        if missing.name != "hypothesis":
            raise
        raise ModuleNotFoundError(
            "fxjacobi.testing.programs needs Hypothesis: pip install 'fxjacobi[test]'", name="hypothesis"
        ) from missing
    return programs
