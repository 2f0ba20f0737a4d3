"""A deterministic diffusion sampler of 100 steps: sweeps and time of every method."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import fxjacobi
from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.bench.cells import relative_error
from fxjacobi.bench.clock import medians
from fxjacobi.bench.example_models import example
from fxjacobi.bench.recurrences import solver_of
from fxjacobi.certificate import Certificate
from fxjacobi.timing import once

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Diffusion"]

_METHODS = ("sequential", "jacobi", "windowed", "chunked", "picard", "anderson", "quasi_newton", "auto")
_EXACT_JACOBIAN = ("damped", "newton")
"""As many derivatives of the denoiser as there are pixels: at 8x8 and one tolerance only."""
_LONG_S = 2.0  # a solve that takes longer is timed once


class Diffusion(Benchmark):
    """DDIM with the small denoiser of ``examples/ddim.py``, batch 1, at 28x28 and 8x8; where it needs the whole Jacobian, at 8x8 alone.

    ``fell_back``: the sweeps got nowhere, and the remaining steps were run in the ordinary order.
    """

    name = "ddim"
    summary = "DDIM, 100 steps, batch 1; errors relative to the largest pixel, against float64"

    @torch.no_grad()
    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each size, tolerance and method."""
        ddim = example("ddim")
        sizes = (8,) if settings.quick else (28, 8)
        for size in sizes:
            model = (ddim.digits_model() if size == 28 else ddim.small_digits_model()).to(settings.device)
            noise, other = (self._noise(settings, size, seed) for seed in (1, 2))
            reference = ddim.sample(copy.deepcopy(model).double(), other.double())
            for rtol in (1e-5,) if settings.quick else (1e-5, 1e-3):
                for method in (*_METHODS, *_EXACT_JACOBIAN) if (size, rtol) == (8, 1e-5) else _METHODS:
                    case = f"{size}x{size}, rtol={rtol:g}, {method}"
                    yield self._row(case, settings, ddim.sample, model, (noise, other), reference, rtol, method)

    @staticmethod
    def _noise(settings: Settings, size: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(settings.seed + seed)
        return torch.randn(1, 1, size, size, generator=generator).to(settings.device)

    @staticmethod
    def _row(
        case: str,
        settings: Settings,
        sample: Any,
        model: Any,
        noises: tuple[torch.Tensor, torch.Tensor],
        reference: torch.Tensor,
        rtol: float,
        method: str,
    ) -> Row:
        compiled = fxjacobi.compile(sample, rtol=rtol, method=method, measure=method == "auto")
        _, first_s = once(partial(compiled, model, noises[0]))
        found, solved_s = once(partial(compiled, model, noises[1]))
        ordinary = sample(model, noises[1])
        blocks = compiled.report.blocks
        slowest = max(blocks, key=lambda b: b.sweeps, default=None)
        calls = [partial(sample, model, noises[1]), partial(compiled, model, noises[1])]
        times = medians(calls[: 1 if solved_s > _LONG_S else 2], device=settings.device, rounds=settings.rounds)
        ordinary_s, solved_s = times[0], times[1] if len(times) > 1 else solved_s
        return Row(
            case,
            {
                "solved_by": solver_of(compiled),
                "sweeps": slowest.sweeps if slowest is not None else 0,
                "fell_back": any(b.certificate is Certificate.FELL_BACK for b in blocks),
                "ordinary_s": ordinary_s,
                "first_call_s": first_s,
                "solved_s": solved_s,
                "ratio": ordinary_s / solved_s,
                "error": relative_error(found, reference),
                "ordinary_error": relative_error(ordinary, reference),
            },
        )
