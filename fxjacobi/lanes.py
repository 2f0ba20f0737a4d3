"""Independent rows of a batched computation on the processor's cores, each core with rows of its own.

Small operations do not gain by threads of their own: two threads inside each product of (64, 128) by (128, 512), with
all others on one, took 27 ms where one thread took 16 ms, and two cores with half of the rows each took 9 ms
(94 steps of an LSTM, torch 2.13).

The cores are shared with OpenMP, which torch's operations run on, and whose threads spin for milliseconds while they
wait for the next one. So a computation that uses lanes takes the cores once (:func:`cores`), for all of its length.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["FEWEST", "cores", "lanes_of", "run_lanes"]

_T = TypeVar("_T")

FEWEST = 4
"""Rows of a lane: with fewer, its products cost as much as with these."""

_PAUSE_SOFT = 1
"""``omp_pause_soft``."""

_lock = threading.Lock()
_pool: tuple[int, ThreadPoolExecutor] | None = None
_holder: tuple[int, int] | None = None
"""The thread that has the cores, and how many it has."""


@contextlib.contextmanager
def cores(wanted: int) -> Iterator[None]:
    """Inside, up to ``wanted`` lanes run side by side, as many as torch has threads, and operations have one thread.

    ``torch.get_num_threads()`` is 1 for everybody then. Where another thread has the cores already, or autocast is on,
    which is a thread's own, nothing changes and there is one lane.
    """
    global _holder  # noqa: PLW0603 - one for the process, guarded by the lock
    threads = torch.get_num_threads()
    count = min(wanted, threads)
    if count == 1 or torch.is_autocast_enabled("cpu") or not _lock.acquire(blocking=False):
        yield
        return
    try:
        _holder = threading.get_ident(), count
        torch.set_num_threads(1)
        _end_waiting_threads()
        yield
    finally:
        torch.set_num_threads(threads)
        _holder = None
        _lock.release()


def lanes_of(rows: int, wanted: int) -> list[range]:
    """Return ``rows`` in ``wanted`` even ranges; in fewer where there are fewer cores, or few rows."""
    held = _holder[1] if _holder is not None and _holder[0] == threading.get_ident() else 1
    count = max(1, min(wanted, held, rows // FEWEST))
    bounds = [rows * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def run_lanes(calls: Sequence[Callable[[], _T]]) -> list[_T]:
    """Return what the calls return, which run side by side on the cores that the caller has. No gradients are recorded.

    Raises:
        BaseException: What the first of the calls that failed raised, when all have ended.
    """
    if len(calls) == 1 or _holder is None or _holder[0] != threading.get_ident():
        with torch.no_grad():
            return [call() for call in calls]
    inference = torch.is_inference_mode_enabled()
    waiting = [_executor(len(calls) - 1).submit(_alone, call, inference) for call in calls[1:]]
    try:
        first = _alone(calls[0], inference)
    finally:
        for one in waiting:
            one.exception()  # waits: what they write to must not be given up before
    return [first, *(one.result() for one in waiting)]


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


def _end_waiting_threads() -> None:
    """End OpenMP's threads that wait for the next operation; it starts new ones when it needs them, in 0.1 ms.

    Once for a computation, not at each run of lanes: a thread that starts while a lane ends is put on the caller's own
    core, and each waits for the other there (seen: solves of 25 ms among those of 9).
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
