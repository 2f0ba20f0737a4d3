"""Medians of functions that take turns, by the clock that fits the device: CUDA events there, wall time elsewhere."""

from __future__ import annotations

import gc
import math
import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Share", "medians"]


class Share:
    """The seconds that a piece of a benchmark may take; what does not fit is left out, and said to be.

    Args:
        seconds: The share, from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._begun = time.perf_counter()

    def left(self) -> float:
        """Seconds that are left, negative once it is spent."""
        return self._seconds - (time.perf_counter() - self._begun)

    def fits(self, seconds: float) -> bool:
        """Whether something that takes so long still fits."""
        return seconds <= self.left()


def _wall(function: Callable[[], object], device: torch.device) -> float:  # noqa: ARG001 - one signature for both clocks
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _events(function: Callable[[], object], device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1e3


def _turn(
    function: Callable[[], object],
    clock: Callable[[Callable[[], object], torch.device], float],
    device: torch.device,
    seconds: float,
) -> list[float]:
    begun = time.perf_counter()
    found = [clock(function, device)]
    while time.perf_counter() - begun + min(found) < seconds:
        found.append(clock(function, device))
    return found[1:] or found


def medians(
    functions: Sequence[Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    budget_s: float = math.inf,
    warmup: int = 1,
    turn_s: float = 0.0,
) -> list[float]:
    """Return the median seconds of one call of each function.

    The functions take turns, first one order and then the other, so that a machine that slows down slows all of them.
    On a CUDA device, two events on the current stream enclose each call; what a function launches on streams of its
    own counts as far as the current stream waits for it.

    Args:
        functions: What to time.
        device: Where they run.
        rounds: Samples of each.
        budget_s: Seconds after which no further round begins; the first is always run.
        warmup: Calls of each before timing.
        turn_s: Seconds that a turn fills with calls, each a sample. Where there is room for more than one, the first is
            not counted: it finds the processor's caches full of another function's code and data.

    Raises:
        ValueError: ``rounds`` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    clock = _events if device.type == "cuda" else _wall
    begun = time.perf_counter()
    for function in functions:
        for _ in range(warmup):
            function()
    samples: list[list[float]] = [[] for _ in functions]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            if turn > 0 and time.perf_counter() - begun > budget_s:
                break
            order = range(len(functions)) if turn % 2 == 0 else reversed(range(len(functions)))
            for place in order:
                samples[place] += _turn(functions[place], clock, device, turn_s)
    finally:
        if collecting:
            gc.enable()
    return [statistics.median(each) for each in samples]
