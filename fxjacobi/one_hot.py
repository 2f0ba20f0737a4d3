"""``torch.nn.functional.one_hot`` while a run is recorded: its check of the classes as one branch that holds for all data.

The original takes the smallest and the largest class out of the tensor to compare them with the number of classes, which
would bind the recording to these very classes. The replacement asks only whether all are in range.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["one_hot_by_range"]


@contextlib.contextmanager
def one_hot_by_range() -> Iterator[None]:
    """Inside, ``functional.one_hot`` with a number of classes checks their range alone; its result is the same."""
    original: Callable[..., torch.Tensor] = functional.one_hot

    def one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
        usual = tensor.dtype is torch.int64 and num_classes > 0 and tensor.numel() > 0 and tensor.device.type == "cpu"
        if not usual or not bool(((tensor >= 0) & (tensor < num_classes)).all()):
            return original(tensor, num_classes)  # which raises, or takes the number of classes from the data
        blank = torch.zeros(*tensor.shape, num_classes, dtype=tensor.dtype, device=tensor.device)
        return blank.scatter_(-1, tensor.unsqueeze(-1), 1)

    functional.one_hot = one_hot
    try:
        yield
    finally:
        functional.one_hot = original
