"""The first job: the inverse of a masked autoregressive flow from the package zuko, whose code stays as it is.

Sampling such a flow of 784 dimensions runs its network 784 times, each time on the result of the time before:
``x = meta(x).inv(z)``. The iteration repeats itself, bit for bit, long before that; fxjacobi notices and stops there.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.bits import first_difference
from fxjacobi.demo.both_ways import both_ways
from fxjacobi.demo.digits import SIDE, digits
from fxjacobi.demo.fit import fit
from fxjacobi.demo.job import DemoError, Outcome
from fxjacobi.progress import bar

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

__all__ = ["FlowJob", "final_sweeps", "invert_flow", "train_flow"]

_NOISE = 0.03  # pixels are discrete; a density of them needs noise
_TEMPERATURE = 0.6  # a little less noise than the flow was trained for gives cleaner digits


@dataclass(frozen=True)
class FlowJob:
    """The flow and its training.

    Args:
        hidden: Width of the network's two hidden layers.
        steps: Steps of Adam.
        batch: Images in a step.
        seed: Seed of weights, batches and samples.
    """

    hidden: int = 512
    steps: int = 300
    batch: int = 128
    seed: int = 0

    @classmethod
    def quick(cls) -> FlowJob:
        """A smaller network with less training."""
        return cls(hidden=128, steps=60)


def train_flow(job: FlowJob, tick: Callable[[], None] = lambda: None) -> Any:
    """Return a ``zuko.flows.MAF`` of 784 dimensions given a class, fitted to the digits; ``tick`` is called each step.

    Raises:
        DemoError: zuko or scikit-learn is not installed.
    """
    try:
        import zuko
    except ModuleNotFoundError as missing:
        raise DemoError("the demo needs zuko: pip install 'fxjacobi[demo]'") from missing
    images, classes = digits()
    flow = zuko.flows.MAF(images.shape[1], context=10, transforms=1, hidden_features=(job.hidden, job.hidden))

    def loss() -> torch.Tensor:
        chosen = torch.randint(0, len(images), (job.batch,))
        noisy = images[chosen] + _NOISE * torch.randn(job.batch, images.shape[1])
        likelihood: torch.Tensor = flow(classes[chosen]).log_prob(noisy)
        return -likelihood.mean() / images.shape[1]

    fit(flow, loss, steps=job.steps, rate=3e-3, tick=tick)
    return flow


def final_sweeps(step: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, limit: int) -> torch.Tensor:
    """Return, for each element, the sweep after which it never changes in ``x = step(x)``; at most ``limit`` sweeps."""
    iterates = [start]
    while len(iterates) <= limit:
        iterates.append(step(iterates[-1]))
        if torch.equal(iterates[-1], iterates[-2]):
            break
    final_at = torch.zeros(start.shape, dtype=torch.int64)
    for sweep, (before, after) in enumerate(pairwise(iterates), start=1):
        final_at[before != after] = sweep
    return final_at


def invert_flow(job: FlowJob, console: Console) -> Outcome:
    """Train the flow, draw one digit of each class both ways, and compare.

    Raises:
        DemoError: zuko or scikit-learn is not installed.
    """
    import fxjacobi

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        with bar("training the flow", job.steps, console=console) as tick:
            flow = train_flow(job, tick)
        noise = _TEMPERATURE * torch.randn(10, SIDE * SIDE)
    transform = flow(torch.eye(10)).transform
    sample = transform.inv
    compiled = fxjacobi.compile(sample)
    with torch.no_grad(), bar("sampling both ways", 4, console=console) as tick:
        both = both_ways(lambda: sample(noise), lambda: compiled(noise), tick)
        autoregressive = transform.transforms[0]
        final_at = final_sweeps(
            lambda x: autoregressive.meta(x).inv(noise), torch.zeros_like(noise), autoregressive.passes
        )
        tick()
    shape = (10, SIDE, SIDE)
    return Outcome(
        title=f"zuko MAF, inverse, {SIDE * SIDE} dimensions, hidden {job.hidden}x2, one digit of each class",
        plan=compiled.plan,
        equations=max((block.equations for block in compiled.plan.blocks), default=1),
        sweeps=compiled.report.sweeps,
        ordinary=both.ordinary.view(shape),
        solved=both.solved.view(shape),
        difference=first_difference(both.solved, both.ordinary),
        final_at=final_at.view(shape),
        ordinary_s=both.ordinary_s,
        first_s=both.first_s,
        solved_s=both.solved_s,
    )
