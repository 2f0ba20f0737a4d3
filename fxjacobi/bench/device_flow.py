"""zuko's masked autoregressive flow on a device: its own inverse beside every other way to run it."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

import fxjacobi
from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.bench.contest import Contest, Values, rows_within
from fxjacobi.bench.example_models import example
from fxjacobi.bench.rivals import by_torch_compile, graphed, in_own_memory
from fxjacobi.testing.assertions import assert_equal_bits
from fxjacobi.timing import once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fxjacobi.bench.clock import Share

__all__ = ["DeviceFlow"]


def _passes(step: Callable[..., torch.Tensor], passes: int, z: torch.Tensor) -> torch.Tensor:
    """The inverse of zuko with another way to run one pass: ``x = meta(x).inv(z)``, so many times from zeros."""
    x = torch.zeros_like(z)
    for _ in range(passes):
        x = step(x, z)
    return x


class DeviceFlow(Benchmark):
    """``zuko.flows.MAF(784, hidden_features=(1024, 1024))``: ``graphed`` is the whole inverse as one CUDA graph."""

    name = "gpu-flow"
    summary = "zuko MAF inverse, 784 dimensions, hidden 1024x2, trained on the device; exact"
    share_s: ClassVar[float] = 40.0

    def cases(self) -> tuple[str, ...]:
        """Every batch."""
        return tuple(f"batch {batch}" for batch in (1, 16, 100))

    @torch.no_grad()
    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each batch."""
        if importlib.util.find_spec("zuko") is None:
            yield from (Row(case, {"not_measured": "zuko is not installed here"}) for case in self.cases())
            return
        flows, data = example("flow"), example("digits")
        sizes = flows.Settings(size=5, hidden=(16,)) if settings.quick else flows.LARGE
        flow = flows.untrained(sizes).to(settings.device)
        flows.train(flow, data.digits(sizes.size).to(settings.device), steps=3 if settings.quick else 200)
        flow.requires_grad_(False)
        batches = (2,) if settings.quick else (1, 16, 100)
        yield from rows_within(
            self.share_s,
            [(f"batch {batch}", 1.0, partial(self._row, settings, flow, sizes, batch)) for batch in batches],
        )

    @staticmethod
    def _row(settings: Settings, flow: Any, sizes: Any, batch: int, _: Share) -> Row:
        generator = torch.Generator().manual_seed(settings.seed)
        first, z = (torch.randn(batch, sizes.size**2, generator=generator).to(settings.device) for _ in range(2))
        transform = flow().transform
        inverse = transform.inv
        compiled = fxjacobi.compile(inverse)
        _, first_s = once(partial(compiled, first))
        wanted = inverse(z)
        assert_equal_bits(compiled(z), wanted)
        facts: Values = {"passes": z.shape[1], "sweeps": compiled.report.sweeps, "equal": True}
        contest = Contest(f"batch {batch}", partial(inverse, z), facts)
        contest.enter("solved", compiled, z, first_s=first_s)
        whole = graphed(inverse, (z,), settings.device)
        contest.enter("graphed", whole.run, z, first_s=whole.first_s, refusal=whole.refusal)
        autoregressive = transform.transforms[0]
        step: Any = lambda x, y: autoregressive.meta(x).inv(y)  # noqa: E731 - one expression, named for what it is
        one = by_torch_compile(step, (torch.zeros_like(z), z), mode="reduce-overhead")
        run = None if one.run is None else partial(_passes, in_own_memory(one.run), autoregressive.passes)
        contest.enter("reduce_overhead", run, z, first_s=one.first_s, refusal=one.refusal)
        for way in contest.ways.values():
            torch.testing.assert_close(way(), wanted, rtol=1e-2, atol=1e-2)
        return contest.row(settings, budget_s=4.0)
