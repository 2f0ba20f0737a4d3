"""The one training loop that all examples share: Adam with a cosine schedule on random batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable


def fit(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    data: Tensor,
    *,
    steps: int,
    batch: int,
    rate: float = 1e-3,
    seed: int = 0,
) -> list[float]:
    """Train `model` in place and leave it in eval mode.

    Args:
        model: whose parameters are trained.
        loss: maps a batch, rows of `data`, to a scalar.
        data: the training set, examples along dimension 0.
        steps: the number of updates.
        batch: the rows of `data` in one update, drawn with replacement.
        rate: the first learning rate; it falls to zero along a cosine.
        seed: of the batches and of whatever `loss` draws; the caller's random state is left as it was.

    Returns:
        The loss before each update.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    losses = []
    model.train()
    # A model may be trained where it is first used, which may be inside no_grad.
    with torch.enable_grad(), torch.random.fork_rng(devices=[data.device] if data.is_cuda else []):
        torch.manual_seed(seed)
        for _ in range(steps):
            rows = torch.randint(data.shape[0], (batch,)).to(data.device)
            value = loss(data[rows])
            optimizer.zero_grad()
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(value.item())
    model.eval()
    return losses
