"""``torch.nn.functional.one_hot`` while a run is recorded: its check of the classes as one branch that holds for all data.

The original takes the smallest and the largest class out of the tensor to compare them with the number of classes, which
would bind the recording to these very classes. The replacement asks only whether all are in range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["one_hot_by_range"]


def one_hot_by_range(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``original``, which is ``functional.one_hot``; a number of classes makes it check their range alone."""

    def one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
        usual = tensor.dtype is torch.int64 and num_classes > 0 and tensor.numel() > 0 and tensor.device.type == "cpu"
        if not usual or not bool(((tensor >= 0) & (tensor < num_classes)).all()):
            return original(tensor, num_classes)  # which raises, or takes the number of classes from the data
        blank = torch.zeros(*tensor.shape, num_classes, dtype=tensor.dtype, device=tensor.device)
        return blank.scatter_(-1, tensor.unsqueeze(-1), 1)

    return one_hot
