"""The order of calls around a capture, and what is put back where it fails, against a torch.cuda that writes them down."""

from __future__ import annotations

import contextlib
import gc
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fxjacobi.device import Refused, runner_for
from fxjacobi.device import cuda_graphs as module
from fxjacobi.device.cuda_graphs import CudaGraphs, StreamOrder
from fxjacobi.device.flags import PinnedReader

if TYPE_CHECKING:
    from collections.abc import Iterator

CPU = torch.device("cpu")


class Cuda:
    """What torch.cuda was asked for, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.stream = "default"
        self.mode: Any = 0
        self.capturing = False
        self.invalid = False  # whether the capture was invalidated
        self.allocating = False


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self.cuda.calls.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: Event) -> None:
        self.cuda.calls.append(f"{self.name} waits for an event on {event.on}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class Event:
    def __init__(self, **_: Any) -> None:
        self.on = ""
        self.waited = 0

    def record(self, stream: Stream) -> None:
        self.on = stream.name

    def synchronize(self) -> None:
        self.waited += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    found = Cuda()

    class Graph:
        def capture_begin(self, *, pool: Any, capture_error_mode: str) -> None:
            assert found.stream == "side"
            assert capture_error_mode == "thread_local"
            found.calls.append("begin")
            found.capturing = found.allocating = True

        def capture_end(self) -> None:
            found.calls.append("end")
            found.capturing = False
            if found.invalid:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            found.allocating = False

        def replay(self) -> None:
            found.calls.append("replay")

        def reset(self) -> None:
            found.calls.append("reset")

    @contextlib.contextmanager
    def on_stream(stream: Stream) -> Iterator[None]:
        before, found.stream = found.stream, stream.name
        try:
            yield
        finally:
            found.stream = before

    def end_allocating(_device: Any, _pool: Any) -> None:
        if not found.allocating:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        found.allocating = False

    def set_mode(mode: Any) -> None:
        found.mode = mode

    for name, value in {
        "CUDAGraph": Graph,
        "Stream": lambda _: Stream(found, "side"),
        "stream": on_stream,
        "current_stream": lambda _=None: Stream(found, found.stream),
        "device": lambda _: contextlib.nullcontext(),
        "synchronize": lambda _=None: found.calls.append("synchronize"),
        "empty_cache": lambda: None,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: found.capturing,
        "get_sync_debug_mode": lambda: found.mode,
        "set_sync_debug_mode": set_mode,
        "Event": Event,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    clear = lambda: found.calls.append("clear")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocating, raising=False)
    monkeypatch.setattr(module, "_abandoned", [])
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    return found


def test_a_capture_is_warmed_up_captured_and_replayed(cuda: Cuda) -> None:
    x, runs = torch.ones(2), []

    def program() -> list[torch.Tensor]:
        runs.append((cuda.stream, cuda.capturing, cuda.mode, gc.isenabled()))
        return [x + 1]

    captured = CudaGraphs().capture(program, CPU)
    assert not isinstance(captured, Refused)
    assert runs == [("side", False, 0, True), ("side", False, "error", True), ("side", True, 0, False)]
    order = ["side waits for default", "synchronize", "clear", "begin", "end", "clear", "default waits for side"]
    assert cuda.calls == order
    captured.replay()
    assert cuda.calls[-1] == "replay"
    assert captured.outputs[0].tolist() == [2.0, 2.0]
    assert (cuda.mode, cuda.stream, gc.isenabled()) == (0, "default", True)


def test_what_no_graph_holds_never_comes_to_a_capture(cuda: Cuda) -> None:
    refused = CudaGraphs().capture(lambda: [torch.ones(2).nonzero()], CPU)
    assert isinstance(refused, Refused)
    assert "depends on data" in refused.reason
    assert "begin" not in cuda.calls
    assert (cuda.mode, cuda.stream, gc.isenabled()) == (0, "default", True)


@pytest.mark.parametrize("invalid", [True, False])
def test_a_capture_that_fails_leaves_everything_as_it_was(cuda: Cuda, invalid: bool) -> None:
    def program() -> list[torch.Tensor]:
        if cuda.capturing:
            cuda.invalid = invalid
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand so on")
        return [torch.ones(2) + 1]

    runner = CudaGraphs()
    refused = runner.capture(program, CPU)
    assert refused == Refused("CUDA error: operation not permitted when stream is capturing")
    assert not cuda.allocating
    assert (cuda.mode, cuda.stream, gc.isenabled()) == (0, "default", True)
    # What torch may still point to is kept; a graph that ended well is let go of.
    assert len(module._abandoned) == invalid
    assert ("reset" in cuda.calls) != invalid
    cuda.invalid = False
    assert not isinstance(runner.capture(lambda: [torch.ones(2) + 1], CPU), Refused)


def test_running_out_of_memory_is_no_refusal(cuda: Cuda) -> None:
    def program() -> list[torch.Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        CudaGraphs().capture(program, CPU)
    assert (cuda.mode, cuda.stream, gc.isenabled()) == (0, "default", True)


def test_inside_a_capture_of_the_users_own_there_is_no_runner(cuda: Cuda) -> None:
    device = torch.device("cuda", 0)
    assert runner_for(device) is runner_for(device)
    cuda.capturing = True
    assert runner_for(device) is None
    assert isinstance(CudaGraphs().capture(list, CPU), Refused)
    assert runner_for(CPU) is None


def test_calls_on_several_streams_wait_for_one_another(cuda: Cuda) -> None:
    order = StreamOrder(CPU)
    for stream in ("a", "a", "b", "a"):
        cuda.stream = stream
        order.enter()
        order.leave()
    assert cuda.calls == ["b waits for an event on a", "a waits for an event on b"]


def test_flags_come_in_order_and_buffers_are_used_again(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    empty = torch.empty

    def pinned(size: int, *, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        made.append(empty(size, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(torch, "empty", pinned)
    reader = PinnedReader(2, torch.int64, CPU)
    for turn in range(5):
        reader.post(torch.tensor([turn, 2 * turn]))
        if turn:
            assert reader.take() == [turn - 1, 2 * turn - 2]
    assert reader.take() == [4, 8]
    assert len(made) == 2  # one on its way while the other is read


def test_with_other_threads_about_the_debug_mode_is_left_alone(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: 2)
    modes = []

    def program() -> list[torch.Tensor]:
        modes.append(cuda.mode)
        return [torch.ones(2) + 1]

    assert not isinstance(CudaGraphs().capture(program, CPU), Refused)
    assert modes == [0, 0, 0]
