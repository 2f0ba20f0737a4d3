"""Flags on their way to the host: pinned memory, an event each, read when a later sweep is already enqueued."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PinnedReader", "read"]


class PinnedReader:
    """Copies of device numbers in pinned host memory (:class:`fxjacobi.device.runner.FlagReader` on CUDA).

    ``post`` enqueues a copy and an event behind it and returns at once; ``take`` waits for the oldest event, which is not
    the end of the stream: what was enqueued after it goes on running. A buffer is used again only after it was taken.

    Args:
        size: How many numbers.
        dtype: Their dtype.
        device: Where they come from.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._size, self._dtype, self._device = size, dtype, device
        self._free: list[tuple[torch.Tensor, Any]] = []
        self._posted: deque[tuple[torch.Tensor, Any]] = deque()

    def post(self, flags: torch.Tensor) -> None:
        """Enqueue a copy of ``flags`` as they are after what is on the current stream."""
        if self._free:
            buffer, event = self._free.pop()
        else:
            buffer = torch.empty(self._size, dtype=self._dtype, pin_memory=True)
            event = torch.cuda.Event(blocking=False)
        buffer.copy_(flags, non_blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._posted.append((buffer, event))

    def take(self) -> list[Any]:
        """Return the oldest flags posted."""
        buffer, event = self._posted.popleft()
        event.synchronize()
        self._free.append((buffer, event))
        values: list[Any] = buffer.tolist()
        return values


def read(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return host copies of ``tensors``: one wait for all of them, on an event of their own."""
    if not tensors or tensors[0].device.type != "cuda":
        return [tensor.detach().cpu() for tensor in tensors]
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensors[0].device))
    event.synchronize()
    return copies
