"""A graph runner for the CPU that behaves as CUDA graphs do, for tests of what stands on them."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fxjacobi.aliasing import storage_key
from fxjacobi.constants import Constants, held
from fxjacobi.device.capturable import Capturable, NotCapturableError, refusal
from fxjacobi.device.runner import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

__all__ = ["GraphDouble", "HostReads"]

aten = torch.ops.aten


class _Capture(Capturable):
    """Runs a program and keeps its operations with the very tensors that they read and made."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.launches.append((func, args, kwargs or {}, result))
        return result


def _first(args: tuple[Any, ...]) -> torch.Tensor | None:
    return next((a for a in args if isinstance(a, torch.Tensor)), None)


class DoubleGraph:
    """A captured program: replaying repeats its operations on the same memory, with the Python values of the capture."""

    def __init__(
        self, double: GraphDouble, capture: _Capture, outputs: tuple[torch.Tensor, ...], held: Constants
    ) -> None:
        self.outputs = outputs
        self._double = double
        self._held = held
        self._launches = capture.launches

    def replay(self) -> None:
        """Repeat every operation; what it returns goes where it went in the capture."""
        self._double.replays += 1
        with torch.no_grad():
            for func, args, kwargs, result in self._launches:
                self._launch(func, args, kwargs, result)

    def _launch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if func._schema.is_mutable:
            func(*args, **kwargs)
            self._double.launches += 1
            return
        source = _first(args)
        results = [
            r for r in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(r, torch.Tensor)
        ]
        if source is not None and all(storage_key(r) == storage_key(source) for r in results):
            return  # a view is no launch: it was made of the capture's memory
        again = func(*args, **kwargs)
        self._double.launches += 1
        renewed = [r for r in (again if isinstance(again, (tuple, list)) else [again]) if isinstance(r, torch.Tensor)]
        for old, new in zip(results, renewed, strict=True):
            old.copy_(new)


class _Reader:
    """Snapshots in the order of their posting; it knows how late each one was taken."""

    def __init__(self, double: GraphDouble, size: int, dtype: torch.dtype) -> None:
        self._double, self._size, self._dtype = double, size, dtype
        self._posted: deque[tuple[list[Any], int]] = deque()
        self._count = 0

    def post(self, flags: torch.Tensor) -> None:
        assert flags.shape == (self._size,), flags.shape
        assert flags.dtype is self._dtype, flags.dtype
        self._count += 1
        self._posted.append((flags.tolist(), self._count))

    def take(self) -> list[Any]:
        values, count = self._posted.popleft()
        self._double.lateness.append(self._count - count)
        return values


class _Order:
    def __init__(self) -> None:
        self._inside = False

    def enter(self) -> None:
        assert not self._inside, "two calls share static buffers at the same time"
        self._inside = True

    def leave(self) -> None:
        self._inside = False


class GraphDouble:
    """See the module's docstring; install it with ``fxjacobi.device.installed("cpu", GraphDouble())``.

    Attributes:
        captures: Programs captured.
        refusals: Reasons for which others were not.
        replays: Replays of captured programs.
        launches: Operations that replays ran.
        lateness: For each flag read, how many were posted after it before it was read.
    """

    def __init__(self, warm_ups: int = 2) -> None:
        self.warm_ups = warm_ups
        self.captures = self.replays = self.launches = 0
        self.refusals: list[str] = []
        self.lateness: list[int] = []

    def capture(self, program: Callable[[], Sequence[torch.Tensor]], device: torch.device) -> DoubleGraph | Refused:  # noqa: ARG002 - the interface's
        """Run ``program`` and keep what it did, or say which operation is no part of a graph."""
        constants: Constants = {}
        with torch.no_grad(), held(constants):
            try:
                for _ in range(self.warm_ups):
                    with _Capture():
                        program()
                with _Capture() as capture:
                    outputs = tuple(program())
            except NotCapturableError as error:
                self.refusals.append(str(error))
                return Refused(str(error))
        self.captures += 1
        return DoubleGraph(self, capture, outputs, constants)

    def reader(self, size: int, dtype: torch.dtype, device: torch.device) -> _Reader:  # noqa: ARG002 - the interface's
        """A reader of snapshots."""
        return _Reader(self, size, dtype)

    def order(self, device: torch.device) -> _Order:  # noqa: ARG002 - the interface's
        """One that fails where two calls overlap."""
        return _Order()

    def on(self, device: torch.device) -> AbstractContextManager[None]:  # noqa: ARG002 - the interface's
        """There is one CPU."""
        return contextlib.nullcontext()


class HostReads(TorchDispatchMode):
    """Counts the operations by which the host waits for a device: values read back, shapes that depend on data."""

    only_watches = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's mode carries no annotations
        self.reads: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        reason = refusal(func, args, kwargs or {})
        if reason is not None:
            self.reads.append(reason)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def host_reads() -> Iterator[list[str]]:
    """Inside, the reasons for which the host would wait are collected."""
    with HostReads() as mode:
        yield mode.reads
