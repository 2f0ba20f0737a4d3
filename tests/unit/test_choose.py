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
    from collections.abc import Sequence
    from pathlib import Path

    from fxjacobi.methods.method import Method

LIKELY: list[Method] = [Chunked(32, 8), Chunked(64, 8), Jacobi(), Chunked(128, 8)]


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
        cell = torch.nn.RNNCell(4, 32)

        def loop(xs: torch.Tensor) -> torch.Tensor:
            state = xs.new_zeros(2, 32)
            for x in xs:
                state = cell(x, state)
            return state

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
