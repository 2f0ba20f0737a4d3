"""GRU and LSTM loops on a device, in both contracts, beside graphs, compiled cells and the fused loop."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch

from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.bench.cells import CellCase, CellLoop, in_float64, relative_error
from fxjacobi.bench.contest import Contest, rows_within
from fxjacobi.bench.recurrences import both_contracts
from fxjacobi.bench.rivals import Rival, by_torch_compile, graphed, in_own_memory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fxjacobi.bench.clock import Share

__all__ = ["DeviceGru", "DeviceLstm"]

_RTOL = 1e-5
# The goal's row first: when the share is spent, the rest is left out.
_SHAPES = (
    (16384, 1), (1024, 1), (4096, 1), (1024, 8), (1024, 64), (4096, 8), (4096, 64), (16384, 8), (16384, 64),
)  # fmt: skip


class _Loops(Benchmark):
    """Loops of one kind of cell, H=128, default initialisation."""

    kind: ClassVar[str]
    share_s: ClassVar[float]

    def cases(self) -> tuple[str, ...]:
        """Every length and batch."""
        return tuple(CellCase(self.kind, "default", *shape).name for shape in _SHAPES)

    @torch.no_grad()
    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each length and batch; ``solved`` is at the tolerance, ``exact`` bit for bit."""
        shapes = ((64, 1), (64, 2)) if settings.quick else _SHAPES
        cells: dict[int, Rival] = {}
        cases = []
        for shape in shapes:
            case = CellCase(self.kind, "default", *shape, 16 if settings.quick else 128)
            cases.append((case.name, float(case.steps), partial(self._row, case, settings, cells)))
        yield from rows_within(self.share_s, cases)

    def _row(self, case: CellCase, settings: Settings, cells: dict[int, Rival], _: Share) -> Row:
        loop = case.loop(settings)
        args, fresh = (case.inputs(settings, 1),), (case.inputs(settings, 2),)
        facts, (ordinary, solved, exact) = both_contracts(loop, args, fresh, _RTOL)
        contest = Contest(case.name, ordinary)
        contest.facts = {k: v for k, v in facts.items() if not k.endswith("_s")}
        contest.enter("solved", solved, first_s=float(facts["first_call_s"]))
        contest.enter("exact", exact, first_s=float(facts["exact_first_call_s"]))
        graph = graphed(loop, fresh, settings.device)
        contest.enter("graphed", graph.run, *fresh, first_s=graph.first_s, refusal=graph.refusal)
        cell = cells.get(case.batch)
        if cell is None:
            closed = Rival(None, refusal="its cell is compiled for batch 1 only: that takes longer than all the rest")
            cell = cells[case.batch] = self._compiled_cell(loop, fresh[0]) if case.batch == 1 else closed
        step = None if cell.run is None else CellLoop(loop.cell, cell.run)
        contest.enter("reduce_overhead", step, *fresh, first_s=cell.first_s, refusal=cell.refusal)
        library = case.fused(loop)
        fused = partial(_first, library)
        contest.enter("fused", fused, *fresh)
        reference = in_float64(loop)(fresh[0].double())
        contest.facts["fused_error"] = relative_error(fused(*fresh), reference)
        for way in contest.ways.values():
            torch.testing.assert_close(way(), ordinary(), rtol=1e-3, atol=1e-3)
        return contest.row(settings, budget_s=8.0)

    @staticmethod
    def _compiled_cell(loop: CellLoop, x: torch.Tensor) -> Rival:
        """Compile the cell for a first step without a state and for the others."""
        cell = by_torch_compile(loop.cell, (x[0], None), (x[1], loop.cell(x[0])), mode="reduce-overhead")
        return cell if cell.run is None else Rival(in_own_memory(cell.run), cell.first_s)


def _first(library: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    states: torch.Tensor = library(x)[0]
    return states


class DeviceGru(_Loops):
    """GRU cells."""

    name = "gpu-gru"
    summary = f"GRU loop, H=128, rtol={_RTOL:g} and exact; fused is torch.nn.GRU, cuDNN's on CUDA"
    kind = "GRU"
    share_s = 120.0


class DeviceLstm(_Loops):
    """LSTM cells."""

    name = "gpu-lstm"
    summary = f"LSTM loop, H=128, rtol={_RTOL:g} and exact; fused is torch.nn.LSTM, cuDNN's on CUDA"
    kind = "LSTM"
    share_s = 90.0
