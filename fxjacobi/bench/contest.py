"""One row of the device benchmarks: the solve beside every other way to run the same program, timed together."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from fxjacobi.bench.benchmark import Row
from fxjacobi.bench.clock import Share, medians

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fxjacobi.bench.benchmark import Settings

__all__ = ["Contest", "Values", "left_out", "rows_within"]

Values: TypeAlias = dict[str, float | int | str | bool]


@dataclass
class Contest:
    """The ways to compute one thing.

    Args:
        case: The row's name.
        ordinary: The eager run.
        facts: Columns that are known before timing.
        ways: Ways beside the eager one, by the name of their column; ``"solved"`` is ours.
        firsts: Seconds of a way's first call.
        refusals: Ways that are closed, with the reason.
        slow: Ways that are timed once, without warming up.
    """

    case: str
    ordinary: Callable[[], Any]
    facts: Values = field(default_factory=dict)
    ways: dict[str, Callable[[], Any]] = field(default_factory=dict)
    firsts: dict[str, float] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    slow: set[str] = field(default_factory=set)

    def enter(
        self, name: str, run: Callable[..., Any] | None, *args: Any, first_s: float = 0.0, refusal: str = ""
    ) -> None:
        """Add a way; one without ``run`` is closed."""
        if run is None:
            self.refusals[name] = refusal
            return
        self.ways[name] = partial(run, *args)
        if first_s:
            self.firsts[name] = first_s

    def row(self, settings: Settings, *, budget_s: float, ordinary_s: float | None = None) -> Row:
        """Time every way in turn; ``ratio`` is the eager run's time over the solve's, ``ratio_to_X`` that of way X.

        Args:
            settings: The device and the rounds.
            budget_s: Seconds after which no further round begins.
            ordinary_s: The eager run's time where it was taken already, because it is too long to repeat.
        """
        quick = [name for name in self.ways if name not in self.slow]
        calls = [self.ways[name] for name in quick]
        if ordinary_s is None:
            calls.append(self.ordinary)
        times = medians(calls, device=settings.device, rounds=settings.rounds, budget_s=budget_s)
        eager_s = times.pop() if ordinary_s is None else ordinary_s
        seconds = dict(zip(quick, times, strict=True))
        for name in self.ways:
            if name in self.slow:
                (seconds[name],) = medians([self.ways[name]], device=settings.device, rounds=1, warmup=0)
        values: Values = {**self.facts, "eager_s": eager_s}
        for name, taken in seconds.items():
            if name in self.firsts:
                values[f"{name}_first_s"] = self.firsts[name]
            values[f"{name}_s"] = taken
        for ours in ("solved", "exact"):
            if ours in seconds:
                values["ratio" if ours == "solved" else "exact_ratio"] = eager_s / seconds[ours]
        if "solved" in seconds:
            rivals = (name for name in seconds if name not in ("solved", "exact"))
            values |= {f"ratio_to_{name}": seconds[name] / seconds["solved"] for name in rivals}
        return Row(self.case, values | {f"{name}_refused": reason for name, reason in self.refusals.items()})


def left_out(case: str, share_s: float) -> Row:
    """Return the row of a case for which no time was left."""
    return Row(case, {"not_measured": f"its piece's share of {share_s:g} s was spent"})


def rows_within(share_s: float, cases: Sequence[tuple[str, float, Callable[[Share], Row]]]) -> Iterator[Row]:
    """Yield the row of each case, as far as they fit into ``share_s`` seconds; the rest are named, not measured.

    So is a case that raises: a wrong result has no speed.

    Args:
        share_s: Seconds for all of them.
        cases: Name, relative cost, and what measures it and is told the share. The first is always measured; from what
            the costliest so far took, the next one's time is foretold.
    """
    share = Share(share_s)
    rate = 0.0
    for name, cost, measure in cases:
        if not share.fits(rate * cost):
            yield left_out(name, share_s)
            continue
        before = share.left()
        try:
            row = measure(share)
        except (AssertionError, RuntimeError) as error:
            # The other rows of a piece are dear too; the run as a whole fails once it is through (runner.py).
            lines = str(error).splitlines()
            said = f"{type(error).__name__}: {lines[0] if lines else ''}"
            row = Row(name, {"not_measured": said, "failed": said})
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # graphs of one case keep their pools; the next one must not miss that memory
        rate = max(rate, (before - share.left()) / cost)
        yield row
