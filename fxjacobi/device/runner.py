"""What the device forms of the blocks ask of a device: capture a program, replay it, read a flag late."""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch._C import _functorch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

__all__ = [
    "Captured",
    "FlagReader",
    "GraphRunner",
    "Late",
    "Order",
    "Refused",
    "installed",
    "runner_for",
    "runner_of",
]


@dataclass(frozen=True, slots=True)
class Refused:
    """A program runs uncaptured, and why."""

    reason: str


class Captured(Protocol):
    """A program that was captured.

    Attributes:
        outputs: What it returned. Every replay writes into these very tensors.
    """

    outputs: tuple[torch.Tensor, ...]

    def replay(self) -> None:
        """Enqueue the program once more on the current stream; the host does not wait."""
        ...


class FlagReader(Protocol):
    """Numbers on their way from the device to the host, in the order in which they were posted."""

    def post(self, flags: torch.Tensor) -> None:
        """Enqueue a copy of ``flags`` (1-dimensional, of the reader's size and dtype) as they are now."""
        ...

    def take(self) -> list[Any]:
        """Return the oldest flags that were not taken yet, as soon as they have arrived.

        Raises:
            IndexError: None are on their way.
        """
        ...


class Order(Protocol):
    """Keeps calls that share static buffers one after another, on whichever streams they come."""

    def enter(self) -> None:
        """The current stream waits for the call before."""
        ...

    def leave(self) -> None:
        """What was enqueued since is what the next call waits for."""
        ...


class GraphRunner(Protocol):
    """Captures programs on one kind of device.

    A program is a function without arguments of static tensors that it closes over: it reads some, writes to others in
    place, and returns tensors. It is run once or more before the capture, so its in-place effects happen then too.
    """

    def capture(self, program: Callable[[], Sequence[torch.Tensor]], device: torch.device) -> Captured | Refused:
        """Return ``program`` captured, or why it cannot be.

        Raises:
            torch.OutOfMemoryError: It does not fit.
        """
        ...

    def reader(self, size: int, dtype: torch.dtype, device: torch.device) -> FlagReader:
        """Return a reader of ``size`` numbers."""
        ...

    def order(self, device: torch.device) -> Order:
        """Return what orders the calls of one form."""
        ...

    def on(self, device: torch.device) -> AbstractContextManager[None]:
        """Make ``device`` the current one."""
        ...


class Late:
    """Flags that are looked at only after ``lag`` later sweeps were enqueued, so that the device is never idle.

    Args:
        reader: Where they travel.
        lag: How many sweeps late.
    """

    def __init__(self, reader: FlagReader, lag: int = 1) -> None:
        self._reader = reader
        self._lag = lag
        self._tags: deque[Any] = deque()

    def post(self, flags: torch.Tensor, tag: Any = None) -> None:
        """Send the flags of the sweep just enqueued; ``tag`` comes back with them."""
        self._reader.post(flags)
        self._tags.append(tag)

    def due(self) -> bool:
        """Whether the oldest flags on their way are ``lag`` sweeps old."""
        return len(self._tags) > self._lag

    @property
    def pending(self) -> bool:
        """Whether any flags are on their way."""
        return bool(self._tags)

    def take(self) -> tuple[list[Any], Any]:
        """Return the oldest flags with their tag."""
        return self._reader.take(), self._tags.popleft()


_installed: dict[str, GraphRunner] = {}


@contextlib.contextmanager
def installed(device_type: str, runner: GraphRunner) -> Iterator[None]:
    """Inside, ``runner`` captures for devices of ``device_type`` (a double for the CPU, in tests)."""
    before = _installed.get(device_type)
    _installed[device_type] = runner
    try:
        yield
    finally:
        if before is None:
            del _installed[device_type]
        else:
            _installed[device_type] = before


def runner_for(device: torch.device) -> GraphRunner | None:
    """Return what captures programs on ``device``; ``None`` on the CPU and wherever nothing does."""
    found = _installed.get(device.type)
    if found is not None or device.type != "cuda":
        return found
    from fxjacobi.device.cuda_graphs import CudaGraphs

    return CudaGraphs.usable()


def runner_of(operands: Sequence[Any]) -> tuple[GraphRunner, torch.device] | None:
    """Return the runner and the device of a call's tensors, if nothing else intercepts operations just now."""
    if not _installed and not torch.cuda.is_initialized():
        return None
    device = next((o.device for o in operands if isinstance(o, torch.Tensor) and o.device.type in _kinds()), None)
    if device is None or _functorch.peek_interpreter_stack() is not None:
        return None
    if any(not getattr(mode, "only_watches", False) for mode in _get_current_dispatch_mode_stack()):
        return None
    runner = runner_for(device)
    return None if runner is None else (runner, device)


def _kinds() -> set[str]:
    return {"cuda", *_installed}
