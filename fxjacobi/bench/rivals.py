"""What else makes a sequential program faster: ``torch.compile``, and a CUDA graph of the ordinary run."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.timing import once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Graphed", "Rival", "by_torch_compile", "graphed", "in_own_memory"]


@dataclass(frozen=True)
class Rival:
    """Another way to run the same function.

    Args:
        run: Takes the function's arguments; ``None`` where the way is closed.
        first_s: Seconds of its first call, which compiles or captures.
        refusal: Why it is closed.
    """

    run: Callable[..., Any] | None
    first_s: float = 0.0
    refusal: str = ""


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    """No compiled code of an earlier process or case is found again: the time is that of compiling."""
    from torch._inductor import config

    torch._dynamo.reset()
    with config.patch("force_disable_caches", True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")  # it is what was asked for
        yield


def by_torch_compile(
    function: Callable[..., Any], *calls: Sequence[Any], mode: str | None = None, backend: str = "inductor"
) -> Rival:
    """Compile ``function`` by ``torch.compile`` with empty caches, and time its first calls.

    Args:
        function: A module or function.
        calls: The arguments of one call for each kind of argument that must be compiled for.
        mode: ``torch.compile``'s own.
        backend: Likewise.
    """
    on_cpu = not any(isinstance(a, torch.Tensor) and a.is_cuda for args in calls for a in args)
    if backend == "inductor" and on_cpu and shutil.which("c++") is None and shutil.which("g++") is None:
        return Rival(None, refusal="torch.compile needs a C++ compiler here")
    with _nothing_kept():
        compiled = torch.compile(function, mode=mode, backend=backend)
        first_s = sum(once(partial(compiled, *args))[1] for args in calls)
    return Rival(compiled, first_s)


def in_own_memory(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``run`` with results copied: a replayed graph writes its next results over the last ones."""

    def copied(*args: Any) -> Any:
        result = run(*args)
        if isinstance(result, tuple):
            return tuple(each.clone() for each in result)
        return result.clone()

    return copied


class Graphed:
    """``function`` on static copies of its tensors, recorded as one CUDA graph and replayed at each call.

    On another device a call runs ``function`` on the same static copies, so that tests can follow the logic there.

    Args:
        function: It must neither synchronise nor depend on the host between its kernels.
        args: Tensors; later calls take tensors of the same shapes.

    Raises:
        RuntimeError: The function cannot be captured.
    """

    def __init__(self, function: Callable[..., Any], args: Sequence[torch.Tensor], device: torch.device) -> None:
        self._static = [argument.clone() for argument in args]
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type != "cuda":
            self._result = function(*self._static)
            return
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # what allocates or tunes at its first call must not do so while captured
            for _ in range(2):
                function(*self._static)
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = function(*self._static)

    def __call__(self, *args: torch.Tensor) -> Any:
        """Return the result for ``args``, in memory that the next call writes over."""
        for static, argument in zip(self._static, args, strict=True):
            static.copy_(argument)
        if self._graph is None:
            self._result = self._function(*self._static)
        else:
            self._graph.replay()
        return self._result


def graphed(function: Callable[..., Any], args: Sequence[torch.Tensor], device: torch.device) -> Rival:
    """Capture ``function`` and time that; a function that cannot be captured is a closed way, with torch's reason."""
    try:
        run, first_s = once(lambda: Graphed(function, args, device))
    except RuntimeError as error:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        lines = str(error).splitlines()
        return Rival(None, refusal=f"not capturable: {lines[0] if lines else type(error).__name__}")
    return Rival(run, first_s)
