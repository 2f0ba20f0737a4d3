"""How much sooner the inverse of a masked autoregressive flow is there."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

import fxjacobi
from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.demo.flow import FlowJob, train_flow
from fxjacobi.testing.assertions import assert_equal_bits
from fxjacobi.timing import interleaved, once

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FlowInverse"]


class FlowInverse(Benchmark):
    """``zuko.flows.MAF(784, hidden_features=(1024, 1024))``, fitted to digits, inverted at batch 1 and 16."""

    name = "flow-inverse"
    summary = "zuko MAF inverse, 784 dimensions, hidden 1024x2"

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each batch size."""
        torch.manual_seed(settings.seed)
        job = FlowJob(hidden=32, steps=5) if settings.quick else FlowJob(hidden=1024, steps=60)
        flow = train_flow(job).to(settings.device)
        for batch in (1,) if settings.quick else (1, 16):
            classes = torch.eye(10, device=settings.device)[torch.arange(batch) % 10]
            noise = torch.randn(batch, 784).to(settings.device)
            sample = flow(classes).transform.inv
            compiled = fxjacobi.compile(sample)
            with torch.no_grad():
                _, first_s = once(partial(compiled, noise))
                # Other noise than the recorded run's.
                noise = torch.randn(batch, 784).to(settings.device)
                assert_equal_bits(compiled(noise), sample(noise))
                ordinary_s, solved_s = interleaved(
                    [partial(sample, noise), partial(compiled, noise)],
                    rounds=min(settings.rounds, 3),
                    warmup=0,
                )
            yield Row(
                f"batch {batch}",
                {
                    "passes": 784,
                    "sweeps": compiled.report.sweeps,
                    "ordinary_s": ordinary_s,
                    "first_call_s": first_s,
                    "solved_s": solved_s,
                    "ratio": ordinary_s / solved_s,
                    "equal": True,
                },
            )
