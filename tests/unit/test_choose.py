"""Which candidates the planner times, and in which form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import fxjacobi
from fxjacobi.choose import _by_lanes
from fxjacobi.lanes import run_lanes
from fxjacobi.methods import Chunked, Jacobi, Sequential

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fxjacobi.methods.method import Method

LIKELY: list[Method] = [Chunked(32, 8), Chunked(64, 8), Jacobi(), Chunked(128, 8)]


def _loop(hidden: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The last state of a plain cell over ``(T, 2, 4)``."""
    cell = torch.nn.RNNCell(4, hidden)

    def loop(xs: torch.Tensor) -> torch.Tensor:
        state = xs.new_zeros(2, hidden)
        for x in xs:
            state = cell(x, state)
        return state

    return loop


@pytest.mark.parametrize(("fastest", "lanes_then"), [
    (Chunked(32, 8, lanes=2), 2), (Chunked(32, 8), 1), (Sequential(), 1),
])  # fmt: skip
def test_the_first_chunks_are_tried_by_lanes_too_and_the_rest_as_was_faster(fastest: Method, lanes_then: int) -> None:
    tried: list[Method] = []

    def leader() -> Method:
        return fastest if fastest in tried else Sequential()

    for method in _by_lanes(LIKELY, 2, leader):
        tried.append(method)
    rest = [Chunked(64, 8, lanes_then), Jacobi(), Chunked(128, 8, lanes_then)]
    assert tried == [Chunked(32, 8), Chunked(32, 8, 2), *rest]


def test_with_one_core_there_are_no_lanes() -> None:
    assert list(_by_lanes(LIKELY, 1, Sequential)) == LIKELY


@torch.no_grad()
def test_a_plan_with_lanes_is_followed_where_it_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is faster here, chunks by lanes are right, and a saved plan brings them back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loop = _loop(32)

        monkeypatch.setattr("fxjacobi.choose.candidates", lambda *_, **__: [Chunked(32, 32, lanes=2)])
        monkeypatch.setattr("fxjacobi.choose._by_lanes", lambda methods, *_: iter(methods))
        monkeypatch.setattr("fxjacobi.choose._sequential_s", lambda *_: 1e6)
        xs = torch.randn(512, 2, 4)
        compiled = fxjacobi.compile(loop, rtol=1e-5, measure=False)
        compiled(xs)
        torch.testing.assert_close(compiled(xs), loop(xs), rtol=0, atol=1e-4)
        assert "lanes=2" in str(compiled.plan)
        path = tmp_path / "plan.json"
        compiled.save_plan(path)
        again = fxjacobi.compile(loop, rtol=1e-5, measure=False, plan=path)
        again(xs)
        runs: list[int] = []

        def counted(calls: Sequence[Any]) -> list[Any]:
            runs.append(len(calls))
            return run_lanes(calls)

        monkeypatch.setattr("fxjacobi.methods.chunks.run_lanes", counted)
        torch.testing.assert_close(again(xs), loop(xs), rtol=0, atol=1e-4)
        assert runs
        assert set(runs) == {2}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Stacked(torch.nn.Module):
    """Three cells a time step, which become a loop within the loop's body."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = torch.nn.ModuleList(torch.nn.GRUCell(6, 6) for _ in range(3))

    def forward(self, xs: torch.Tensor) -> torch.Tensor:
        states = [torch.zeros(xs.shape[1], 6) for _ in self.cells]
        rows = []
        for y in xs:
            for i, cell in enumerate(self.cells):
                states[i] = y = cell(y, states[i])
            rows.append(y)
        return torch.stack(rows)


def runge_kutta(y: torch.Tensor, us: torch.Tensor) -> torch.Tensor:
    """Return a damped oscillator's end under a force, four evaluations a time step."""

    def f(y: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.stack([y[..., 1], -y[..., 0] - 0.3 * y[..., 1] + u], -1)

    for u in us:
        k1 = f(y, u)
        k2 = f(y + 0.025 * k1, u)
        k3 = f(y + 0.025 * k2, u)
        y = y + 0.05 / 6 * (k1 + 2 * k2 + 2 * k3 + f(y + 0.05 * k3, u))
    return y


@torch.no_grad()
@pytest.mark.parametrize(("rtol", "method"), [(0.0, "auto"), (1e-5, "auto"), (1e-5, "chunked"), (1e-5, "jacobi")])
def test_bodies_that_hold_loops_are_solved_in_chunks(rtol: float, method: str) -> None:
    models: list[tuple[Any, tuple[torch.Tensor, ...]]] = [
        (Stacked(), (torch.randn(200, 3, 6),)), (runge_kutta, (torch.randn(3, 2), torch.randn(200, 3)))
    ]  # fmt: skip
    for model, arguments in models:
        compiled = fxjacobi.compile(model, rtol=rtol, method=method, measure=False, strict=True)
        compiled(*arguments)
        found, wanted = compiled(*arguments), model(*arguments)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2 * rtol * float(wanted.abs().max()))
        assert compiled.report.solved
        assert "raised" not in str(compiled.plan)


@torch.no_grad()
def test_a_candidate_that_fails_is_noted_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Planted: one method's sweep raises, then the measure of the memory that sizes come from."""

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    loop = _loop(8)

    xs = torch.randn(200, 2, 4)
    for place in ("fxjacobi.methods.chunked.run_chunks", "fxjacobi.choose.candidates"):
        with monkeypatch.context() as patch:
            patch.setattr(place, broken)
            for options in ({"rtol": 1e-5}, {}, {"rtol": 1e-5, "method": "jacobi"}):
                compiled = fxjacobi.compile(loop, strict=True, measure=False, **options)
                compiled(xs)
                torch.testing.assert_close(compiled(xs), loop(xs), rtol=1e-4, atol=1e-4)
                if options == {"rtol": 1e-5}:
                    assert "it raised RuntimeError: planted" in str(compiled.plan)
                    assert any("failed while it was measured" in record.message for record in caplog.records)
