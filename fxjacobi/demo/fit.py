"""Training of the demo's models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["fit"]


def fit(
    model: nn.Module, loss: Callable[[], torch.Tensor], *, steps: int, rate: float, tick: Callable[[], None]
) -> None:
    """Take ``steps`` steps of Adam down ``loss``, which draws a batch of its own at each; ``tick`` is called after each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tick()
