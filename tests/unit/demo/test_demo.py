from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from fxjacobi.bits import first_difference
from fxjacobi.demo import DemoError, run
from fxjacobi.demo import run as run_demo
from fxjacobi.demo.digits import digits
from fxjacobi.demo.flow import FlowJob, final_sweeps, invert_flow
from fxjacobi.demo.run import _print

if TYPE_CHECKING:
    from pathlib import Path

    from fxjacobi.demo import Outcome

SMALL = FlowJob(hidden=16, steps=3, batch=8)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return invert_flow(SMALL, Console(file=io.StringIO()))


def test_the_flow_of_784_dimensions_needs_few_sweeps_and_is_equal(outcome: Outcome) -> None:
    assert outcome.difference is None
    assert outcome.equations == 784
    assert 1 < outcome.sweeps < 100
    assert outcome.ordinary.shape == outcome.solved.shape == (10, 28, 28)
    assert outcome.plan.solved


def test_a_sweep_finishes_at_least_one_more_dimension(outcome: Outcome) -> None:
    final_at = outcome.final_at.flatten(1)
    assert bool((final_at <= torch.arange(1, 785)).all()), "dimension i is final after sweep i at the latest"
    assert int(final_at.max()) <= outcome.sweeps


def test_final_sweeps_of_a_shift_are_the_positions() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.ones(1), x[:-1] + 1])

    assert final_sweeps(step, torch.zeros(5), 10).tolist() == [1, 2, 3, 4, 5]
    assert final_sweeps(step, torch.zeros(5), 2).tolist() == [1, 2, 2, 2, 2]


def test_the_same_seed_gives_the_same_digits_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, second = (invert_flow(SMALL, Console(file=io.StringIO())) for _ in range(2))
    assert torch.equal(first.solved, second.solved)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_printed(outcome: Outcome) -> None:
    out = io.StringIO()
    _print(outcome, Console(file=out, width=100))
    assert "equal: yes (7840 elements)" in out.getvalue()
    assert "fxjacobi plan (exact)" in out.getvalue()
    assert f"sweeps: {outcome.sweeps}" in out.getvalue()


def test_a_difference_is_printed(outcome: Outcome) -> None:
    out = io.StringIO()
    wrong = outcome.solved + 1
    _print(replace(outcome, difference=first_difference(wrong, outcome.ordinary)), Console(file=out, width=200))
    assert "equal: no" in out.getvalue()


def test_the_demo_writes_a_picture_and_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlowJob, "quick", classmethod(lambda cls: SMALL))
    out = io.StringIO()
    assert run(tmp_path / "demo.png", quick=True, console=Console(file=out, width=100))
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert f"picture: {tmp_path / 'demo.png'}" in out.getvalue()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zuko", None)
    with pytest.raises(DemoError, match=r"zuko: pip install 'fxjacobi\[demo\]'"):
        run_demo(tmp_path / "demo.png")
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(DemoError, match="scikit-learn"):
        digits()
