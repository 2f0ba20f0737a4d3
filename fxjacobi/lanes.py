"""Independent rows of a batched computation on the processor's cores, each core with rows of its own.

Small operations do not gain by threads of their own: two threads inside each product of (64, 128) by (128, 512), with
all others on one, took 27 ms where one thread took 16 ms, and two cores with half of the rows each took 9 ms
(94 steps of an LSTM, torch 2.13).
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["lanes_of", "run_lanes"]

_T = TypeVar("_T")

_FEWEST = 4
"""Rows of a lane: with fewer, its products cost as much as with these."""

_PAUSE_SOFT = 1
"""``omp_pause_soft``."""

_lock = threading.Lock()
_pool: tuple[int, ThreadPoolExecutor] | None = None


def lanes_of(rows: int, lanes: int) -> list[range]:
    """Return ``rows`` in ``lanes`` even ranges; in fewer where torch has fewer threads, or there are few rows."""
    count = max(1, min(lanes, torch.get_num_threads(), rows // _FEWEST))
    bounds = [rows * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def run_lanes(calls: Sequence[Callable[[], _T]]) -> list[_T]:
    """Return what the calls return, which run side by side, each with one thread inside its operations.

    No gradients are recorded. While they run, ``torch.get_num_threads()`` is 1 for everybody; where another thread of
    the caller's is here already, these run one after the other.

    Raises:
        BaseException: What the first of the calls that failed raised, when all have ended.
    """
    modes = torch.is_autocast_enabled("cpu")
    if len(calls) == 1 or modes or not _lock.acquire(blocking=False):
        with torch.no_grad():
            return [call() for call in calls]
    try:
        threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()
        torch.set_num_threads(1)
        _let_go_of_cores()
        try:
            waiting = [_executor(len(calls) - 1).submit(_alone, call, inference) for call in calls[1:]]
            try:
                first = _alone(calls[0], inference)
            finally:
                for one in waiting:
                    one.exception()  # waits: what they write to must not be given up before
            return [first, *(one.result() for one in waiting)]
        finally:
            torch.set_num_threads(threads)
    finally:
        _lock.release()


def _alone(call: Callable[[], _T], inference: bool) -> _T:
    with torch.inference_mode(inference), torch.no_grad():  # both are a thread's own
        return call()


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """Return ``omp_pause_resource_all`` (OpenMP 5.0, section 3.2.44) of the OpenMP that torch runs on, if it has it."""
    try:
        pause: Callable[[int], int] = ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    except (OSError, AttributeError):
        return None
    return pause


def _let_go_of_cores() -> None:
    """End OpenMP's threads that wait for the next operation, which start anew with it.

    They wait by spinning, for milliseconds, on the cores that the lanes want: a solve after an ordinary operation took
    11 ms where it takes 7 now. Ending and starting takes 0.1 ms.
    """
    pause = _pause()
    if pause is not None:
        pause(_PAUSE_SOFT)


def _executor(workers: int) -> ThreadPoolExecutor:
    """Return a pool of at least so many threads; threads do not live on in a forked process.

    Each says itself that it is one thread: some libraries below torch ask OpenMP, thread by thread. One that starts
    threads of its own there makes OpenMP's more than the cores, whereupon it lets all of the process sleep between
    operations: the caller's own loops then took four times as long (measured: 35 ms became 140 ms).
    """
    global _pool  # noqa: PLW0603 - one for the process, guarded by the lock
    if _pool is None or _pool[0] != os.getpid() or _pool[1]._max_workers < workers:
        _pool = os.getpid(), ThreadPoolExecutor(workers, "fxjacobi", torch.set_num_threads, (1,))
    return _pool[1]
