"""Plans that someone edited by hand: an error of the plan, whatever is wrong with them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fxjacobi
from fxjacobi.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def rnn(xs: torch.Tensor) -> torch.Tensor:
    h = torch.zeros(3, 6)
    for x in xs:
        h = torch.tanh(0.3 * h + x)
    return h


def _first(plan: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(iter(plan["decisions"].values()))
    return found


@pytest.mark.parametrize("spoil", [
    lambda p: p.update(rtol="abc"), lambda p: p.update(rtol=None), lambda p: p.update(rtol=float("nan")),
    lambda p: p.update(warm_start="yes"), lambda p: p.update(guess=[]), lambda p: p.update(decisions=[]),
    lambda p: _first(p).update(solved="no"), lambda p: _first(p).update(reason=1),
    lambda p: _first(p).update(solved_s="fast"), lambda p: _first(p).update(methods=[1]),
    lambda p: _first(p)["methods"][0].update(name=3), lambda p: _first(p)["methods"][0].update(options=None),
    lambda p: _first(p)["methods"][0]["options"].update(chunk=20.5),
    lambda p: _first(p)["methods"][0]["options"].update(chunk=True),
    lambda p: _first(p)["methods"][0]["options"].update(unknown=1),
])  # fmt: skip
def test_a_damaged_plan_is_an_error_of_the_plan(spoil: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    path, xs = tmp_path / "plan.json", torch.randn(100, 3, 6)
    compiled = fxjacobi.compile(rnn, rtol=1e-5, method="chunked", measure=False)
    compiled(xs)
    compiled.save_plan(path)
    fxjacobi.compile(rnn, rtol=1e-5, plan=path)(xs)
    plan = json.loads(path.read_text())
    spoil(plan)
    path.write_text(json.dumps(plan))
    with pytest.raises(PlanError):
        fxjacobi.compile(rnn, rtol=1e-5, plan=path)(xs)


def test_a_plan_and_a_method_contradict_each_other(tmp_path: Path) -> None:
    path, xs = tmp_path / "plan.json", torch.randn(100, 3, 6)
    compiled = fxjacobi.compile(rnn, rtol=1e-5, method="chunked", measure=False)
    compiled(xs)
    compiled.save_plan(path)
    with pytest.raises(PlanError, match="newton"):
        fxjacobi.compile(rnn, rtol=1e-5, plan=path, method="newton")
