"""Timing two or more functions in one run: warmed up, interleaved, medians."""

from __future__ import annotations

import gc
import statistics
import time
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["interleaved", "once", "started"]

T = TypeVar("T")


def started() -> Callable[[], float]:
    """Start a clock; the function returned reads the seconds since, when all that was enqueued meanwhile is done.

    Where CUDA is in use these are the device's own, by two events on the current stream: the device is idle at the first,
    so the host's part counts too. An event says nothing of other devices; with several in use the host's clock is read.
    """
    devices = _devices()
    for device in devices:
        torch.cuda.synchronize(device)
    if not devices or devices != [torch.cuda.current_device()]:
        begun = time.perf_counter()

        def elapsed() -> float:
            for device in devices:
                torch.cuda.synchronize(device)
            return time.perf_counter() - begun

        return elapsed
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()

    def measured() -> float:
        last.record()
        last.synchronize()
        milliseconds: float = first.elapsed_time(last)
        return milliseconds / 1e3

    return measured


def _devices() -> list[int]:
    """The CUDA devices that hold memory: on the others nothing runs, and asking them would make them a context."""
    if not torch.cuda.is_initialized():
        return []
    return [device for device in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(device)]


def once(function: Callable[[], T]) -> tuple[T, float]:
    """Return what ``function`` returns and the seconds that it took."""
    clock = started()
    result = function()
    return result, clock()


def _sample(function: Callable[[], object], number: int) -> float:
    clock = started()
    for _ in range(number):
        function()
    return clock() / number


def interleaved(
    functions: Sequence[Callable[[], object]], *, rounds: int, sample_s: float = 0.0, warmup: int = 1
) -> list[float]:
    """Return the median seconds of one call of each function.

    The functions take turns, first one order and then the other, so that a machine that slows down slows all of them.

    Args:
        functions: What to time.
        rounds: Samples of each.
        sample_s: Seconds that a sample should last at least: a short function is called many times in it.
        warmup: Calls of each before timing.

    Raises:
        ValueError: ``rounds`` is less than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    for function in functions:
        for _ in range(warmup):
            function()
    numbers = [max(1, round(sample_s / max(_sample(function, 1), 1e-9))) if sample_s else 1 for function in functions]
    samples: list[list[float]] = [[] for _ in functions]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            order = range(len(functions)) if turn % 2 == 0 else reversed(range(len(functions)))
            for place in order:
                samples[place].append(_sample(functions[place], numbers[place]))
    finally:
        if collecting:
            gc.enable()
    return [statistics.median(each) for each in samples]
