"""Runs the demo's jobs and prints what came of them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console

from fxjacobi.demo.flow import FlowJob, invert_flow
from fxjacobi.demo.job import DemoError
from fxjacobi.demo.made import MadeJob, sample_made
from fxjacobi.demo.picture import draw

if TYPE_CHECKING:
    from pathlib import Path

    from fxjacobi.demo.job import Outcome

__all__ = ["run"]


def run(out: Path, *, quick: bool = False, console: Console | None = None) -> bool:
    """Run every job, print plans, sweeps and times, write a picture to ``out``; return whether all results are equal.

    Raises:
        DemoError: A package of the extra ``demo`` is missing, or ``out`` lies in no folder.
    """
    console = console or Console()
    if not out.resolve().parent.is_dir():
        raise DemoError(f"{out}: there is no folder {out.resolve().parent}")
    if find_spec("matplotlib") is None:  # better said now than after the work
        raise DemoError("the demo's picture needs matplotlib: pip install 'fxjacobi[demo]'")
    outcomes = [
        invert_flow(FlowJob.quick() if quick else FlowJob(), console),
        sample_made(MadeJob.quick() if quick else MadeJob(), console),
    ]
    for outcome in outcomes:
        _print(outcome, console)
    draw(outcomes, out)
    console.print(f"picture: {out}", soft_wrap=True)
    return all(outcome.difference is None for outcome in outcomes)


def _print(outcome: Outcome, console: Console) -> None:
    console.rule(outcome.title, align="left")
    console.print(str(outcome.plan), highlight=False, markup=False, soft_wrap=True)
    console.print(f"sweeps: {outcome.sweeps} (the ordinary run makes {outcome.equations} passes)")
    console.print(
        f"ordinary run: {outcome.ordinary_s:.3f} s   first compiled call: {outcome.first_s:.3f} s   "
        f"later calls: {outcome.solved_s:.3f} s   ratio: {outcome.ordinary_s / outcome.solved_s:.1f}",
        soft_wrap=True,
    )
    if outcome.difference is None:
        console.print(f"equal: yes ({outcome.ordinary.numel()} elements)")
    else:
        console.print(f"equal: no ({outcome.difference})")
