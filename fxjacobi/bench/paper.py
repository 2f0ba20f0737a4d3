"""The paper's two experiments that are no sampling: training a recurrent network, and evaluating a DenseNet."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING

import torch

import fxjacobi
from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.bench.clock import medians
from fxjacobi.bench.example_models import example
from fxjacobi.bench.recurrences import solver_of
from fxjacobi.testing.assertions import assert_equal_bits
from fxjacobi.timing import once

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Paper"]


class Paper(Benchmark):
    """arXiv 2002.03629, sections 5.1 and 5.2, with what the compiler finds by itself.

    Training: one whole step (forward, backward) at batch 1; errors of the gradients, relative to the largest of their
    tensor, against float64. The paper's step is 1.89 times faster with 10 truncated sweeps; its limit, with the forward run
    sequential, is 2.04. DenseNet: the paper's 2.13 is computed, not run; every layer has other shapes, so there is no loop,
    and the original runs.
    """

    name = "paper"
    summary = "the paper's RNN backpropagation (T=100, H=128, softplus) and DenseNet-201 evaluation, batch 1"

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each contract and tolerance of the training step, and one for the DenseNet."""
        for rtol in (0.0, 1e-5, 1e-3):
            yield self._training(settings, rtol)
        yield self._densenet(settings)

    @staticmethod
    def _training(settings: Settings, rtol: float) -> Row:
        paper = example("paper_backpropagation")
        model = paper.network(settings.seed).to(settings.device)
        xs = paper.pixels().to(settings.device)
        compiled = fxjacobi.compile(model, rtol=rtol)
        _, first_s = once(partial(paper.gradients, model, compiled, xs[:1]))
        x = xs[1:2]
        found, wanted = paper.gradients(model, compiled, x), paper.gradients(model, model, x)
        double = copy.deepcopy(model).double()
        exact = paper.gradients(double, double, x.double())

        def worst(gradients: list[torch.Tensor]) -> float:
            pairs = zip(gradients, exact, strict=True)
            return max(float((g.double() - e).abs().max() / e.abs().max()) for g, e in pairs)

        if rtol == 0.0:
            with torch.no_grad():
                assert_equal_bits(compiled(x), model(x))
        steps = [partial(paper.gradients, model, run, x) for run in (model, compiled)]
        ordinary_s, solved_s = medians(steps, device=settings.device, rounds=4 * settings.rounds)
        return Row(
            f"training step, {'exact' if rtol == 0 else f'rtol={rtol:g}'}",
            {
                "method": solver_of(compiled),
                "sweeps": compiled.report.sweeps,
                "ordinary_s": ordinary_s,
                "first_call_s": first_s,
                "solved_s": solved_s,
                "ratio": ordinary_s / solved_s,
                "error": worst(found),
                "ordinary_error": worst(wanted),
                "paper_ratio": 1.89,
            },
        )

    @staticmethod
    @torch.no_grad()
    def _densenet(settings: Settings) -> Row:
        densenet = example("paper_densenet")
        model = (densenet.network((2, 2), 4) if settings.quick else densenet.network()).to(settings.device)
        generator = torch.Generator().manual_seed(settings.seed)
        size = 32 if settings.quick else 224
        first, x = (torch.randn(1, 3, size, size, generator=generator).to(settings.device) for _ in range(2))
        compiled = fxjacobi.compile(model)
        _, first_s = once(partial(compiled, first))
        assert_equal_bits(compiled(x), model(x))
        ordinary_s, solved_s = medians(
            [partial(model, x), partial(compiled, x)], device=settings.device, rounds=settings.rounds
        )
        return Row(
            "DenseNet-201",
            {
                "method": solver_of(compiled),
                "sweeps": compiled.report.sweeps,
                "ordinary_s": ordinary_s,
                "first_call_s": first_s,
                "solved_s": solved_s,
                "ratio": ordinary_s / solved_s,
                "paper_ratio": 2.13,
            },
        )
