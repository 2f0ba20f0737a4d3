"""The tolerance contract end to end, the planner's choices, and saved plans."""

from __future__ import annotations

import importlib
import json
import math
import re
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from torch import nn

import fxjacobi
from fxjacobi.methods import Base, Contract, Jacobi, memory_length
from fxjacobi.solve import TrialError, solve_system
from fxjacobi.system import System
from fxjacobi.testing.recurrences import gru
from fxjacobi.verify import equal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def _rnn(cell: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    def run(xs: torch.Tensor) -> torch.Tensor:
        state = None
        rows = []
        for t in range(xs.shape[0]):
            state = cell(xs[t], state)
            rows.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(rows)

    return run


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize(
    "method", ["jacobi", "windowed", "chunked", "newton", "quasi_newton", "damped", "picard", "anderson"]
)
def test_every_method_solves_every_cell_within_tolerance(kind: type[nn.Module], method: str) -> None:
    torch.manual_seed(0)
    cell = kind(3, 4)
    run = _rnn(cell)
    xs = torch.randn(70, 2, 3)
    with torch.no_grad():
        compiled = fxjacobi.compile(run, rtol=1e-5, method=method, measure=False)
        compiled(xs)
        fresh = torch.randn(70, 2, 3)
        found, wanted = compiled(fresh), run(fresh)
        assert compiled.report.solved
        exact = _rnn(cell.double())(fresh.double())
        cell.float()
    assert float((found - wanted).abs().max()) <= 1e-4
    assert float((found.double() - exact).abs().max()) <= 1e-4
    assert method in {b.method.split("(")[0].replace("quasinewton", "quasi_newton") for b in compiled.plan.blocks}


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_chaotic_cells_are_still_right(scale: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 8) / 8**0.5 * 2 * scale

    def chaotic(xs: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(2, 8)
        rows = []
        for t in range(xs.shape[0]):
            h = torch.tanh(h @ weight + xs[t])
            rows.append(h)
        return torch.stack(rows)

    xs = torch.randn(120, 2, 8)
    with torch.no_grad():
        compiled = fxjacobi.compile(chaotic, rtol=1e-6, method="chunked", measure=False)
        compiled(xs)
        found, wanted = compiled(xs), chaotic(xs)
    # A chaotic system amplifies every rounding; what must hold is each equation, and the prefix before it grows.
    assert torch.allclose(found[:5], wanted[:5], rtol=1e-4, atol=1e-5)
    previous = torch.cat([torch.zeros(1, 2, 8), found[:-1]])
    assert float((torch.tanh(previous @ weight + xs) - found).abs().max()) <= 1e-5


def test_affine_recurrences_are_recognised() -> None:
    def average(xs: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        h = torch.zeros_like(xs[0])
        rows = []
        for t in range(xs.shape[0]):
            h = decay[t] * h + (1 - decay[t]) * xs[t]
            rows.append(h)
        return torch.stack(rows)

    xs, decay = torch.randn(256, 3, 5), torch.rand(256, 3, 5)
    with torch.no_grad():
        compiled = fxjacobi.compile(average, rtol=1e-5, method="affine", measure=False)
        compiled(xs, decay)
        torch.testing.assert_close(compiled(xs, decay), average(xs, decay), rtol=1e-4, atol=1e-5)
    assert any(b.method.startswith("affine") for b in compiled.plan.blocks)


def test_gradients_of_a_chunked_solve() -> None:
    cell = nn.GRUCell(3, 4).double()
    run = _rnn(cell)
    xs = torch.randn(64, 2, 3, dtype=torch.float64)
    compiled = fxjacobi.compile(run, rtol=1e-10, method="chunked", measure=False)
    compiled(xs)
    results = []
    for each in (compiled, run):
        leaf = xs.clone().requires_grad_()
        cell.zero_grad()
        each(leaf).square().sum().backward()
        results.append([leaf.grad, *[p.grad for p in cell.parameters()]])
    for a, b in zip(*results, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_the_exact_contract_never_takes_an_approximate_method() -> None:
    run = _rnn(nn.GRUCell(3, 4))
    with torch.no_grad():
        compiled = fxjacobi.compile(run, method="newton", measure=False)
        xs = torch.randn(40, 2, 3)
        assert equal(compiled(xs), run(xs))
        assert equal(compiled(xs), run(xs))
    assert any("not lawful" in b.reason for b in compiled.plan.blocks)


def test_candidates_are_shown() -> None:
    run = _rnn(nn.GRUCell(4, 16))
    with torch.no_grad():
        compiled = fxjacobi.compile(run, rtol=1e-4)
        compiled(torch.randn(200, 1, 4))
    rows = [c for b in compiled.plan.blocks for c in b.candidates]
    assert rows[0].method == "sequential"
    assert rows[0].seconds is not None
    assert len(rows) > 1


def test_the_plan_shows_time_and_sweeps_and_what_another_contract_would_gain(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run, xs = _rnn(nn.GRUCell(4, 32)), torch.randn(400, 1, 4)
    with torch.no_grad():
        compiled = fxjacobi.compile(run, rtol=1e-4, measure=False)
        compiled(xs)
        shown = str(compiled.plan)
        assert re.search(r"recurrence_\d: sequential: [\d.]+ ms, the ordinary order", shown)
        assert re.search(r"recurrence_\d: chunked\(\d+.*\): [\d.]+ ms, \d+ sweeps", shown)
        compiled.plan.to_html(tmp_path / "plan.html")
        assert re.search(r"<li>recurrence_\d: chunked", (tmp_path / "plan.html").read_text())
        exact = fxjacobi.compile(run, measure=False)
        exact(xs)
    for line in exact.plan.would_gain:  # whether it would gain depends on the machine; what is said does not
        assert re.fullmatch(r"exact: sequential; at rtol=1e-5: [a-z_]+(\(.*\))?, [\d.]+x on this block", line)
        assert line in str(exact.plan)


def test_what_another_contract_would_gain_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the loop in order is said to take long."""
    monkeypatch.setattr("fxjacobi.choose._sequential_s", lambda *_: 0.1)
    with torch.no_grad():
        compiled = fxjacobi.compile(_rnn(nn.GRUCell(4, 8)), measure=False, budget_s=20.0)
        compiled(torch.randn(100, 1, 4))
    (line,) = compiled.plan.would_gain
    assert re.fullmatch(r"exact: sequential; at rtol=1e-5: native, [\d.]+x on this block", line)


def test_measuring_is_bounded_and_shows_a_bar_when_it_lasts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, xs = _rnn(nn.GRUCell(4, 8)), torch.randn(100, 1, 4)
    monkeypatch.setattr("fxjacobi.progress.Console", lambda **_: Console(force_terminal=True, stderr=True, width=80))
    for silent, shown in ((3600.0, False), (0.0, True)):
        monkeypatch.setattr("fxjacobi.choose._SILENT_S", silent)
        with torch.no_grad():
            compiled = fxjacobi.compile(run, rtol=1e-4, measure=False, budget_s=0.0)
            compiled(xs)
        assert ("measuring methods" in capsys.readouterr().err) == shown
        rows = [c for b in compiled.plan.blocks for c in b.candidates]
        assert rows
        assert all("budget was spent" in c.note for c in rows if c.method != "sequential")


def test_a_trial_ends_in_time_and_completes_nothing() -> None:
    recurrence = gru(100, 1, 8)
    system = System(recurrence.loop, recurrence.operands)
    late = Contract(rtol=1e-5, trial_until=0.0)
    with pytest.raises(TrialError, match="takes too long"):
        solve_system(system, Jacobi(), late, Base())
    diverging = Contract(rtol=1e-5, max_sweeps=2, trial_until=math.inf)
    with pytest.raises(TrialError, match="do not converge"):
        solve_system(system, Jacobi(), diverging, Base())
    assert solve_system(system, Jacobi(), Contract(rtol=1e-5, trial_until=math.inf), Base()).solution.completed == 0


def test_planning_reports_no_error_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that measures ends by an exception; torch's report of one would import torch.compile, for seconds."""

    def reported(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("reported")

    monkeypatch.setattr("torch.fx.interpreter.trace_structured", reported)
    with torch.no_grad():
        compiled = fxjacobi.compile(_rnn(nn.GRUCell(4, 8)), measure=False, strict=True)
        compiled(torch.randn(100, 1, 4))
    assert any(b.candidates for b in compiled.plan.blocks)


@pytest.mark.parametrize("decay", [0.2, 0.9, 0.97])
def test_sizes_come_from_the_measured_contraction(decay: float) -> None:
    def run(xs: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(2, 4)
        rows = []
        for t in range(xs.shape[0]):
            h = torch.tanh(decay * h + xs[t])
            rows.append(h)
        return torch.stack(rows)

    xs, sizes = 1e-3 * torch.randn(300, 2, 4), {}
    # A unit deviate, e^-n after n / -log(decay) steps, has to come down to 1e-5 of states of some 1e-3.
    wanted = math.log(1e-8) / math.log(decay)
    with torch.no_grad():
        for method in ("chunked", "windowed"):
            compiled = fxjacobi.compile(run, rtol=1e-5, method=method, measure=False)
            compiled(xs)
            (block,) = [b for b in compiled.plan.blocks if b.method.startswith(method)]
            sizes[method] = int(re.findall(r"\d+", block.method)[0])
            torch.testing.assert_close(compiled(xs), run(xs), rtol=0, atol=1e-6)
    assert sizes["windowed"] <= 300
    if 4 * wanted < 300:
        assert wanted / 2 < sizes["windowed"] / 2 < 2 * wanted
        assert wanted / 2 < sizes["chunked"] < 4 * wanted


def test_a_saved_plan_is_followed_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _rnn(nn.GRUCell(4, 8))
    xs = torch.randn(100, 1, 4)
    path = tmp_path / "plan.json"
    with torch.no_grad():
        compiled = fxjacobi.compile(run, rtol=1e-4, method="chunked", measure=False)
        with pytest.raises(fxjacobi.PlanError, match="call the module once"):
            compiled.save_plan(path)
        compiled(xs)
        compiled.save_plan(path)

        def measured(*args: Any) -> Any:
            raise AssertionError("something was timed")

        monkeypatch.setattr("fxjacobi.choose._choose", measured)
        monkeypatch.setattr("fxjacobi.compiler._Compilation._decide", measured)
        loaded = fxjacobi.compile(run, rtol=1e-4, plan=path)
        loaded(xs)
        assert [b.method for b in loaded.plan.blocks] == [b.method for b in compiled.plan.blocks]
        torch.testing.assert_close(loaded(xs), run(xs), rtol=1e-3, atol=1e-3)
        with pytest.raises(fxjacobi.PlanError, match="another graph"):
            loaded(torch.randn(101, 1, 4))


@pytest.mark.parametrize("key", ["torch", "device", "format"])
def test_a_plan_from_elsewhere_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "plan.json"
    compiled = fxjacobi.compile(_rnn(nn.GRUCell(4, 8)))
    with torch.no_grad():
        compiled(torch.randn(10, 1, 4))
    compiled.save_plan(path)
    content = json.loads(path.read_text())
    content[key] = "other"
    path.write_text(json.dumps(content))
    with pytest.raises(fxjacobi.PlanError, match=key):
        fxjacobi.compile(torch.sin, plan=path)


def test_machine_code_is_measured_whatever_the_search_for_the_memory_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: looking for the memory takes all of the budget."""
    whole = memory_length

    def slow(*args: Any) -> int | None:
        time.sleep(0.4)
        return whole(*args)

    # The package has a function of the module's name.
    monkeypatch.setattr(importlib.import_module("fxjacobi.methods.candidates"), "memory_length", slow)
    with torch.no_grad():
        compiled = fxjacobi.compile(_rnn(nn.GRUCell(4, 8)), rtol=1e-5, measure=False)
        compiled(torch.randn(100, 1, 4))
    rows = {c.method: c for b in compiled.plan.blocks for c in b.candidates}
    assert rows["native"].seconds is not None
    assert any("budget was spent" in c.note for c in rows.values())
