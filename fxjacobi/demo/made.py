"""The second job: sampling a masked autoregressive density estimator, one logistic a pixel.

MADE (Germain et al., arXiv 1502.03509) with the sizes of arXiv 2002.03629, section 5.3. The sampling loop is written as
a user would; fxjacobi proves from the masks that pixel ``t`` depends on pixels before it only, and sweeps all at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from fxjacobi.bits import first_difference
from fxjacobi.demo.both_ways import both_ways
from fxjacobi.demo.digits import SIDE, digits
from fxjacobi.demo.fit import fit
from fxjacobi.demo.flow import final_sweeps
from fxjacobi.demo.job import Outcome
from fxjacobi.progress import bar

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

__all__ = ["MadeJob", "sample_made"]

_NOISE = 0.06  # pixels are discrete; a density of them needs noise


@dataclass(frozen=True)
class MadeJob:
    """The network and its training.

    Args:
        hidden: Width of the two hidden layers.
        steps: Steps of Adam.
        batch: Images in a step.
        samples: Images drawn.
        seed: Seed of weights, batches and samples.
    """

    hidden: int = 512
    steps: int = 400
    batch: int = 128
    samples: int = 10
    seed: int = 0

    @classmethod
    def quick(cls) -> MadeJob:
        """A smaller network with less training."""
        return cls(hidden=128, steps=60)


class _Masked(nn.Linear):
    """A linear layer some of whose weights are fixed to zero."""

    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


class _Made(nn.Module):
    """Means and log scales ``(B, 2 D)`` of pixels ``(B, D)``, those of pixel ``t`` from pixels before it."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        degrees = 1 + torch.arange(hidden) % (features - 1)
        pixels = torch.arange(1, features + 1)
        self.net = nn.Sequential(
            _Masked((degrees[:, None] >= pixels).float()),
            nn.ReLU(),
            _Masked((degrees[:, None] >= degrees).float()),
            nn.ReLU(),
            _Masked((pixels.repeat(2)[:, None] > degrees).float()),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parameters: torch.Tensor = self.net(x)
        return parameters


@torch.no_grad()
def _sample(model: _Made, n: int) -> torch.Tensor:
    x = torch.zeros(n, SIDE * SIDE)
    for t in range(SIDE * SIDE):
        mean, logscale = model(x).chunk(2, -1)
        x[:, t] = mean[:, t] + logscale[:, t].exp() * torch.rand(n).logit()
    return x


def _train(job: MadeJob, tick: Callable[[], None]) -> _Made:
    images, _ = digits()
    model = _Made(images.shape[1], job.hidden)

    def loss() -> torch.Tensor:
        x = images[torch.randint(0, len(images), (job.batch,))]
        x = x + _NOISE * torch.rand_like(x)
        mean, logscale = model(x).chunk(2, -1)
        z = (x - mean) * torch.exp(-logscale)
        surprise: torch.Tensor = z + logscale + 2 * functional.softplus(-z)
        return surprise.mean()

    fit(model, loss, steps=job.steps, rate=2e-3, tick=tick)
    return model


def sample_made(job: MadeJob, console: Console) -> Outcome:
    """Train the network, draw images both ways from the same seed, and compare.

    Raises:
        DemoError: scikit-learn is not installed.
    """
    import fxjacobi

    features = SIDE * SIDE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        with bar("training MADE", job.steps, console=console) as tick:
            model = _train(job, tick)
        compiled = fxjacobi.compile(_sample)

        def seeded(sample: Callable[[_Made, int], torch.Tensor]) -> torch.Tensor:
            torch.manual_seed(job.seed + 1)
            return sample(model, job.samples)

        with torch.no_grad(), bar("sampling both ways", 4, console=console) as tick:
            both = both_ways(lambda: seeded(_sample), lambda: seeded(compiled), tick)
            torch.manual_seed(job.seed + 1)
            noise = torch.stack([torch.rand(job.samples).logit() for _ in range(features)], 1)

            def sweep(x: torch.Tensor) -> torch.Tensor:
                mean, logscale = model(x).chunk(2, -1)
                swept: torch.Tensor = mean + logscale.exp() * noise
                return swept

            final_at = final_sweeps(sweep, torch.zeros(job.samples, features), features)
            tick()
    shape = (job.samples, SIDE, SIDE)
    return Outcome(
        title=f"MADE, {features} dimensions, hidden {job.hidden}x2, {job.samples} samples",
        plan=compiled.plan,
        equations=features,
        sweeps=compiled.report.sweeps,
        ordinary=both.ordinary.view(shape),
        solved=both.solved.view(shape),
        difference=first_difference(both.solved, both.ordinary),
        final_at=final_at.view(shape),
        ordinary_s=both.ordinary_s,
        first_s=both.first_s,
        solved_s=both.solved_s,
    )
