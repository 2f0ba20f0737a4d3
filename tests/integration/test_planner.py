"""The tolerance contract end to end, the planner's choices, and saved plans."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import fxjacobi
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
