"""Rows side by side: each core takes some, and the process is left as it was."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from fxjacobi import lanes
from fxjacobi.lanes import cores, lanes_of, run_lanes
from fxjacobi.methods import Chunked, Contract
from fxjacobi.methods.chunks import prepared, run_chunks
from fxjacobi.solve import solve
from fxjacobi.system import System
from fxjacobi.testing.recurrences import autoregressive, gru, lstm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fxjacobi.testing.recurrences import Recurrence


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 33])
def test_lanes_take_every_row_once(rows: int) -> None:
    with cores(2):
        found = lanes_of(rows, 2)
    assert [row for lane in found for row in lane] == list(range(rows))
    assert len(found) == (2 if rows >= 8 else 1)


def test_there_are_no_more_lanes_than_threads_of_torch() -> None:
    with cores(5):
        assert len(lanes_of(100, 5)) == 2
        assert len(lanes_of(100, 1)) == 1
    assert len(lanes_of(100, 5)) == 1
    torch.set_num_threads(1)
    with cores(5):
        assert len(lanes_of(100, 5)) == 1


def test_one_thread_has_the_cores() -> None:
    inside, asked = threading.Event(), threading.Event()

    def other() -> None:
        with cores(2):
            inside.set()
            asked.wait(20)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(20)
    with cores(2):
        assert len(lanes_of(100, 2)) == 1
        (one, two) = run_lanes([lambda: threading.current_thread().name] * 2)
        assert one == two == threading.current_thread().name
    asked.set()
    thread.join()
    assert not lanes._lock.locked()


def test_what_a_thread_keeps_to_itself_keeps_others_out() -> None:
    with torch.autocast("cpu"), cores(2):
        assert len(lanes_of(100, 2)) == 1


def test_calls_run_at_once_each_on_one_thread_without_gradients() -> None:
    meet = threading.Barrier(2, timeout=20)

    def call(number: int) -> tuple[int, int, bool]:
        meet.wait()  # passes only where both are running
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    with cores(2):
        assert run_lanes([partial(call, 0), partial(call, 1)]) == [(0, 1, False), (1, 1, False)]
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()


def test_inference_mode_goes_along() -> None:
    with torch.inference_mode(), cores(2):
        assert run_lanes([torch.is_inference_mode_enabled] * 2) == [True, True]
    with cores(2):
        assert run_lanes([torch.is_inference_mode_enabled] * 2) == [False, False]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_raised_when_all_have_ended(failing: int) -> None:
    ended = threading.Event()

    def fail() -> None:
        raise torch.OutOfMemoryError("planted")

    def work() -> None:
        torch.ones(200, 200) @ torch.ones(200, 200)
        ended.set()

    calls: list[Callable[[], None]] = [work, work]
    calls[failing] = fail
    with pytest.raises(torch.OutOfMemoryError, match="planted"), cores(2):
        run_lanes(calls)
    assert ended.is_set()
    assert torch.get_num_threads() == 2
    assert not lanes._lock.locked()


def test_a_forked_process_has_a_pool_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with cores(2):
        run_lanes([int, int])
        first = lanes._pool
        monkeypatch.setattr("fxjacobi.lanes.os.getpid", lambda: -1)
        run_lanes([int, int])
    assert lanes._pool is not first
    monkeypatch.setattr(lanes, "_pool", None)


_THREADS = """
import os, torch
from fxjacobi.lanes import cores, run_lanes

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
a = torch.ones(256, 256)
with cores(2):
    run_lanes([int, int])  # a lane's own thread, which does nothing yet
a @ a  # and OpenMP's second thread
before = count()
for _ in range(3):
    with cores(2):
        run_lanes([lambda: a @ a, lambda: a @ a])
a @ a
print(count() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc")
def test_lanes_leave_no_threads_of_openmp_behind() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_"))}
    found = subprocess.run(
        [sys.executable, "-c", _THREADS], capture_output=True, text=True, check=True, env=environment
    )
    assert int(found.stdout) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="torch's OpenMP is libgomp there")
def test_openmp_is_told_to_let_go_of_the_cores() -> None:
    pause = lanes._pause()
    assert pause is not None
    torch.ones(256, 256) @ torch.ones(256, 256)
    assert pause(lanes._PAUSE_SOFT) == 0


@torch.no_grad()
@pytest.mark.parametrize("make", [gru, lstm, autoregressive])
@pytest.mark.parametrize("warm_up", [0, 1, 5, 16])
@pytest.mark.parametrize("samples", [None, (0, 2)], ids=["all samples", "some"])
def test_chunks_by_lanes_are_those_of_one(
    make: Callable[..., Recurrence], warm_up: int, samples: tuple[int, ...] | None
) -> None:
    recurrence = make(96 + warm_up, 3, 4, dtype=torch.float64)
    starts = (0, *range(8 + warm_up, 96 + warm_up, 8))
    system = System(recurrence.loop, recurrence.operands)
    if samples is not None and make is autoregressive:
        pytest.skip("its rows do not fold into a batch")
    some = None if samples is None else torch.tensor(samples)
    with cores(2):
        by_two = prepared(system, system.base(), starts, 8, warm_up=warm_up, samples=some, cores=2)
        by_one = prepared(system, system.base(), starts, 8, warm_up=warm_up, samples=some)
        assert (len(by_two.lanes), len(by_one.lanes)) == (2, 1)
        swept = [run_chunks(system, chunks) for chunks in (by_two, by_one)]
    found = [(*each.states, *each.others, *each.heads) for each in swept]
    for two, one in zip(*found, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-12, atol=1e-13)


def test_a_solve_by_lanes_is_the_sequential_answer() -> None:
    recurrence = gru(400, 3, 8)
    found, solution = solve(recurrence.loop, recurrence.operands, Chunked(40, 40, lanes=2), Contract(rtol=1e-6))
    assert solution.sweeps <= 2
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=0, atol=2e-6)
