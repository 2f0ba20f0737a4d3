"""CUDA graphs behind :class:`fxjacobi.device.runner.GraphRunner`.

What is looked up in torch (``torch/cuda/graphs.py``, ``CUDAGraph.cpp``, ``_inductor/cudagraph_trees.py``) and kept to:

- A program runs first on a side stream, as lazily made handles and autotuning must not fall into the capture; and under
  a dispatch mode that refuses what cannot be captured, because an operation that synchronises invalidates a capture, and
  torch before 2.12 leaves its allocators in the middle of one (pytorch#180395, #190348).
- Each capture has a memory pool of its own. Graphs that share one may be replayed only in the order of their capture
  and with no output alive across; blocks are replayed in any order, and keep their outputs.
- cuBLAS's workspaces are cleared before a capture, so that the graph's own lies in its pool, and after it, so that
  nobody else gets that memory. Otherwise somebody's clearing would free memory that a graph writes to.
- ``capture_error_mode="thread_local"``: other threads may allocate and synchronise while this one captures. One capture
  at a time in the process.
- A replay runs on the current stream. Calls on different streams that share static buffers wait for one another by
  events (:class:`fxjacobi.device.runner.Order`).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import warnings
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.constants import Constants, held
from fxjacobi.device.capturable import Capturable, NotCapturableError
from fxjacobi.device.flags import PinnedReader
from fxjacobi.device.runner import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

__all__ = ["CudaGraph", "CudaGraphs"]

_log = logging.getLogger(__name__)

_WARM_UPS = 2

_abandoned: list[Any] = []
"""Graphs whose capture failed: torch's host allocator may hold a pointer to them (pytorch#190308)."""

_capturing = threading.Lock()


class CudaGraph:
    """One captured program, with all that its graph reads by address."""

    def __init__(self, graph: Any, outputs: tuple[torch.Tensor, ...], constants: Constants) -> None:
        self.outputs = outputs
        self._graph = graph
        self._constants = constants

    def replay(self) -> None:
        """Enqueue the graph on the current stream."""
        self._graph.replay()


class StreamOrder:
    """Calls on several streams, one after another on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: tuple[Any, Any] | None = None  # stream and event of the call before

    def enter(self) -> None:
        """Wait, on the device, for the call before if it was on another stream."""
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last[0] != stream:
            stream.wait_event(self._last[1])

    def leave(self) -> None:
        """Mark the end of this call."""
        stream = torch.cuda.current_stream(self._device)
        event = torch.cuda.Event() if self._last is None else self._last[1]
        event.record(stream)
        self._last = (stream, event)


class CudaGraphs:
    """The one runner of a process; it holds a side stream for each device."""

    _instance: CudaGraphs | None = None

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    @classmethod
    def usable(cls) -> CudaGraphs | None:
        """The runner, or ``None`` where a capture of the user's own is going on: a graph cannot capture a solve."""
        if torch.cuda.is_current_stream_capturing():
            return None
        if cls._instance is None:
            cls._instance = cls()
        return cls._instance

    def reader(self, size: int, dtype: torch.dtype, device: torch.device) -> PinnedReader:
        """Flags through pinned memory."""
        return PinnedReader(size, dtype, device)

    def order(self, device: torch.device) -> StreamOrder:
        """Order by events."""
        return StreamOrder(device)

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """Make ``device`` the current one."""
        found: AbstractContextManager[None] = torch.cuda.device(device)
        return found

    def capture(self, program: Callable[[], Sequence[torch.Tensor]], device: torch.device) -> CudaGraph | Refused:
        """Warm up, capture, and recover where that fails."""
        if torch.cuda.is_current_stream_capturing():
            return Refused("a CUDA graph is being captured on this stream already")
        constants: Constants = {}
        with _capturing, self.on(device), torch.no_grad(), held(constants):
            current = torch.cuda.current_stream(device)
            stream = self._stream(device)
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):
                    self._warm_up(program)
                    captured = self._captured(program, device, stream, constants)
            except torch.OutOfMemoryError:
                raise
            except (NotCapturableError, RuntimeError, TypeError) as error:
                _log.info("not captured", exc_info=True)
                lines = str(error).strip().splitlines()
                return Refused(lines[0] if lines else type(error).__name__)
            finally:
                current.wait_stream(stream)
            return captured

    def _stream(self, device: torch.device) -> Any:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    @staticmethod
    def _warm_up(program: Callable[[], Sequence[torch.Tensor]]) -> None:
        # The dispatch mode sees what is dispatched; what synchronises below the dispatcher shows in the debug mode,
        # which is the whole process's: with other threads about, they would meet the error.
        alone = threading.active_count() == 1
        before = torch.cuda.get_sync_debug_mode()
        for turn in range(_WARM_UPS):
            if turn and alone:
                _set_sync_debug_mode("error")
            try:
                with Capturable():
                    program()
            finally:
                if turn and alone:
                    _set_sync_debug_mode(before)

    def _captured(
        self,
        program: Callable[[], Sequence[torch.Tensor]],
        device: torch.device,
        stream: Any,
        constants: Constants,
    ) -> CudaGraph:
        graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        _clear_workspaces()
        outputs: tuple[torch.Tensor, ...] = ()
        failure: BaseException | None = None
        with _no_collection():
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    with Capturable():
                        outputs = tuple(program())
                except BaseException as error:  # noqa: BLE001 - raised again, once the capture has been ended
                    failure = error
                graph.capture_end()
            except RuntimeError as error:
                self._abandon(graph, pool, device, stream)
                raise failure or error from None
            finally:
                _clear_workspaces()
        if failure is not None:
            graph.reset()
            raise failure
        return CudaGraph(graph, outputs, constants)

    def _abandon(self, graph: Any, pool: Any, device: torch.device, stream: Any) -> None:
        """Leave torch as it was before a capture that failed."""
        _abandoned.append(graph)
        if self._streams.get(device) is stream:
            del self._streams[device]
        try:
            torch._C._cuda_endAllocateToPool(device.index, pool)
        except RuntimeError:  # it was ended already, as from torch 2.12 on
            _log.debug("the allocator had left the pool of the failed capture", exc_info=True)


def _set_sync_debug_mode(mode: int | str) -> None:
    """Set what happens where the host waits; torch's notice that the mode is a prototype is not the user's concern."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode(mode)


def _clear_workspaces() -> None:
    torch._C._cuda_clearCublasWorkspaces()


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage that is collected in the middle of a capture may call what a capture forbids."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
