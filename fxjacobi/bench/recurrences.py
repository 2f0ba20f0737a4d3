"""Float recurrences in both contracts, beside the eager loop, ``torch.nn``'s fused loops and ``torch.compile``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import torch

import fxjacobi
from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.bench.cells import KINDS, CellCase, CellLoop, average, average_step, in_float64, relative_error
from fxjacobi.bench.clock import medians
from fxjacobi.bench.rivals import by_torch_compile
from fxjacobi.testing.assertions import assert_equal_bits
from fxjacobi.timing import once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Recurrences", "both_contracts", "solver_of"]

_RTOL = 1e-5

_TURN_S = 0.1
"""Seconds of each turn: ten calls of what takes 10 ms."""

Values: TypeAlias = dict[str, float | int | str | bool]
Call: TypeAlias = "Callable[[], torch.Tensor]"


def solver_of(compiled: fxjacobi.SolvedModule) -> str:
    """Return the method of the last call's longest recurrence, or that the original ran."""
    if not compiled.report.solved:
        return "original"
    blocks = [b for b in compiled.plan.blocks if b.kind is not None and b.kind.value == "recurrence"]
    return max(blocks, key=lambda b: b.equations).method if blocks else "no recurrence"


def both_contracts(
    model: Callable[..., torch.Tensor], args: tuple[torch.Tensor, ...], fresh: tuple[torch.Tensor, ...], rtol: float
) -> tuple[Values, list[Call]]:
    """Compile ``model`` with a tolerance and exactly, and compare both with the ordinary run.

    Args:
        model: The ordinary loop.
        args: What the first, recorded call takes.
        fresh: Other values, which are judged and timed.
        rtol: The tolerance.

    Returns:
        Columns on accuracy and first calls, and what is to be timed: the ordinary run, the solve, the exact solve.

    Raises:
        AssertionError: The exact result differs from the ordinary one.
    """
    compiled, exactly = fxjacobi.compile(model, rtol=rtol), fxjacobi.compile(model)
    _, first_s = once(partial(compiled, *args))
    _, exact_first_s = once(partial(exactly, *args))
    found, ordinary = compiled(*fresh), model(*fresh)
    assert_equal_bits(exactly(*fresh), ordinary)
    reference = in_float64(model)(*(value.double() for value in fresh))
    values: Values = {
        "method": solver_of(compiled),
        "sweeps": compiled.report.sweeps,
        "first_call_s": first_s,
        "error": relative_error(found, reference),
        "ordinary_error": relative_error(ordinary, reference),
        "exact_method": solver_of(exactly),
        "exact_first_call_s": exact_first_s,
        "exact_equal": True,
    }
    return values, [partial(model, *fresh), partial(compiled, *fresh), partial(exactly, *fresh)]


class Recurrences(Benchmark):
    """Cells of width 128 at rtol 1e-5 and exactly, default and trained weights, and an affine recurrence.

    ``torch_nn``: the fused loop of torch.nn with the same weights. ``compiled_cell``: the loop with its cell under
    torch.compile, in one row a kind. ``compiled_loop``: the whole loop under torch.compile, in the rows of at most 512
    steps only, because compiling one takes more than a minute there and grows faster than the loop.
    """

    name = "recurrences"
    summary = f"H=128, rtol={_RTOL:g} and exact; errors relative to the largest state, against float64"

    @torch.no_grad()
    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each cell, weights, length and batch."""
        for case in self._cases(settings):
            yield self._cell_row(case, settings, whole_loop=case.steps <= 512)
        yield self._affine_row(settings)

    @staticmethod
    def _cases(settings: Settings) -> list[CellCase]:
        if settings.quick:
            return [CellCase("GRU", "default", 64, 1, 16), CellCase("LSTM", "rows", 64, 2)]
        shapes = ((1024, 1), (4096, 1), (1024, 8))
        cases = [CellCase(kind, "default", *shape) for kind in KINDS for shape in shapes]
        cases += [CellCase(kind, by, *shape) for by in ("rows", "pixels") for kind in KINDS for shape in shapes]
        # The last rows are those whose whole loop torch.compile unrolls: as long as it takes about a minute at most.
        return cases + [CellCase(kind, "default", 512 if kind == "GRU" else 128, 1) for kind in KINDS]

    @staticmethod
    def _cell_row(case: CellCase, settings: Settings, *, whole_loop: bool) -> Row:
        loop = case.loop(settings)
        args, fresh = (case.inputs(settings, 1),), (case.inputs(settings, 2),)
        facts, calls = both_contracts(loop, args, fresh, _RTOL)
        rivals: dict[str, Callable[..., torch.Tensor]] = {}
        library = case.fused(loop)
        rivals["torch_nn_s"] = lambda x: library(x)[0]
        firsts: Values = {}
        x = fresh[0]
        # Compiled for the first step, which has no state, and for the others.
        # One row a kind of cell: weights and lengths change nothing about its code.
        if settings.quick or (case.weights, case.steps, case.batch) == ("default", 1024, 1):
            cell = by_torch_compile(loop.cell, (x[0], None), (x[1], loop.cell(x[0])))
            if cell.run is not None:
                rivals["compiled_cell_s"] = CellLoop(loop.cell, cell.run)
                firsts["compiled_cell_first_s"] = cell.first_s
        if whole_loop and not settings.quick:
            whole = by_torch_compile(loop, fresh)
            if whole.run is not None:
                rivals["compiled_loop_s"] = whole.run
                firsts["compiled_loop_first_s"] = whole.first_s
        return _row(case.name, settings, facts, calls, rivals, firsts, fresh)

    @staticmethod
    def _affine_row(settings: Settings) -> Row:
        steps, hidden = (64, 16) if settings.quick else (4096, 128)
        torch.manual_seed(settings.seed)
        args, fresh = (
            tuple(make(steps, 1, hidden).to(settings.device) for make in (torch.randn, torch.rand)) for _ in range(2)
        )
        facts, calls = both_contracts(average, args, fresh, _RTOL)
        rivals: dict[str, Callable[..., torch.Tensor]] = {}
        firsts: Values = {}
        step = by_torch_compile(average_step, [torch.zeros_like(fresh[0][0]), fresh[0][0], fresh[1][0]])
        if step.run is not None:
            rivals["compiled_cell_s"] = partial(average, step=step.run)
            firsts["compiled_cell_first_s"] = step.first_s
        return _row(f"affine, T={steps}, B=1", settings, facts, calls, rivals, firsts, fresh)


def _row(
    case: str,
    settings: Settings,
    facts: Values,
    calls: list[Call],
    rivals: dict[str, Callable[..., torch.Tensor]],
    firsts: Values,
    fresh: tuple[torch.Tensor, ...],
) -> Row:
    """Time everything together; a rival whose result is far from the ordinary one is no rival, and raises."""
    ordinary = calls[0]()
    for rival in rivals.values():
        torch.testing.assert_close(rival(*fresh), ordinary, rtol=1e-3, atol=1e-4)
    runs: list[Call] = [*calls, *(partial(rival, *fresh) for rival in rivals.values())]
    times = medians(runs, device=settings.device, rounds=settings.rounds, turn_s=_TURN_S)
    ordinary_s, solved_s, exact_s = times[:3]
    values: Values = {
        "method": facts["method"],
        "sweeps": facts["sweeps"],
        "ordinary_s": ordinary_s,
        "first_call_s": facts["first_call_s"],
        "solved_s": solved_s,
        "ratio": ordinary_s / solved_s,
        "error": facts["error"],
        "ordinary_error": facts["ordinary_error"],
        "exact_method": facts["exact_method"],
        "exact_first_call_s": facts["exact_first_call_s"],
        "exact_s": exact_s,
        "exact_ratio": ordinary_s / exact_s,
        "exact_equal": facts["exact_equal"],
    }
    values |= dict(zip(rivals, times[3:], strict=True))
    return Row(case, values | firsts)
