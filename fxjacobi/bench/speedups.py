"""How the gain of each method depends on the length and on the batch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

import fxjacobi
from fxjacobi import native
from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.bench.cells import CellCase
from fxjacobi.bench.clock import medians

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["METHODS", "Speedups"]

METHODS = ("native", "chunked", "windowed", "jacobi", "quasi_newton", "anderson", "picard")
_RTOL = 1e-5


class Speedups(Benchmark):
    """Times of the eager GRU loop over those of each method, over T at batch 1 and over B at 1,024 steps.

    ``exact`` is ``fxjacobi.compile(model)``, ``auto`` the same at the tolerance, where the planner times the methods; the
    other columns are forced methods at the tolerance, each with the sizes that the planner measures for it. ``native``, machine
    code, is left out where there is none: on a CUDA device, and without the package llvmlite.
    """

    name = "speedups"
    summary = f"GRU, H=128, default initialisation, rtol={_RTOL:g}: times faster than the eager loop, by method"

    @torch.no_grad()
    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each length and batch."""
        longest = 16384 if settings.device.type == "cuda" else 4096
        shapes = [(t, 1) for t in (64, 256, 1024, 4096, 16384) if t <= longest]
        shapes += [(1024, b) for b in (2, 4, 8, 16, 32)]
        if settings.quick:
            shapes = [(64, 1), (128, 1), (64, 4)]
        for steps, batch in shapes:
            yield self._row(CellCase("GRU", "default", steps, batch, 16 if settings.quick else 128), settings)

    @staticmethod
    def _row(case: CellCase, settings: Settings) -> Row:
        loop, x, fresh = case.loop(settings), case.inputs(settings, 1), case.inputs(settings, 2)
        wanted = loop(fresh)
        calls: dict[str, Callable[[], torch.Tensor]] = {"ordinary": partial(loop, fresh)}
        compiled = {"exact": fxjacobi.compile(loop), "auto": fxjacobi.compile(loop, rtol=_RTOL)}
        there = settings.device.type == "cpu" and native.missing() is None
        methods = [m for m in METHODS if m != "native" or there]
        compiled |= {m: fxjacobi.compile(loop, rtol=_RTOL, method=m, measure=False) for m in methods}
        for method, each in compiled.items():
            each(x)
            # A solve stays within a bounded number of tolerances of the ordinary run; exactly means exactly.
            bound = 0.0 if method == "exact" else 100 * _RTOL
            error = float((each(fresh) - wanted).abs().max() / wanted.abs().max())
            assert error <= bound, f"{case.name}, {method}: off by {error:.3g}"
            calls[method] = partial(each, fresh)
        times = dict(
            zip(
                calls,
                medians(list(calls.values()), device=settings.device, rounds=settings.rounds, turn_s=0.1),
                strict=True,
            )
        )
        ratios = {method: times["ordinary"] / seconds for method, seconds in times.items() if method != "ordinary"}
        return Row(case.name, {"steps": case.steps, "batch": case.batch, "ordinary_s": times["ordinary"], **ratios})
