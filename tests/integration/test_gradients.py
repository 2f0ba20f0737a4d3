"""gradcheck in float64 of emitted modules: a recurrence, a map, a fixed point; and results that are dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

import fxjacobi
from fxjacobi.verify import equal

if TYPE_CHECKING:
    from collections.abc import Callable

WEIGHT = 0.4 * torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def recurrence(xs: torch.Tensor) -> torch.Tensor:
    h = torch.zeros_like(xs[0])
    rows = []
    for t in range(xs.shape[0]):
        h = torch.tanh(h @ WEIGHT + xs[t])
        rows.append(h)
    return torch.stack(rows)


def heads(xs: torch.Tensor) -> torch.Tensor:
    return torch.stack([(xs[t] @ WEIGHT).sin() * (t + 1) for t in range(xs.shape[0])])


def fixed_point(xs: torch.Tensor) -> torch.Tensor:
    x = torch.zeros_like(xs[0])
    for _ in range(9):
        x = torch.tanh(x @ torch.triu(WEIGHT, 1)) + xs[0]
    return x


@pytest.mark.parametrize(("fn", "kind"), [(recurrence, "recurrence"), (heads, "map"), (fixed_point, "fixed_point")])
def test_gradcheck(fn: Callable[[torch.Tensor], torch.Tensor], kind: str) -> None:
    compiled = fxjacobi.compile(fn, measure=False)
    xs = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    compiled(xs)
    assert kind in {b.kind.value for b in compiled.plan.blocks if b.kind is not None}
    assert torch.autograd.gradcheck(compiled, (xs,))
    assert compiled.report.solved


@dataclass
class Output:
    last: torch.Tensor
    rows: list[torch.Tensor]
    note: str | None = None


def test_dataclass_results() -> None:
    def run(xs: torch.Tensor) -> Output:
        rows = []
        h = torch.zeros_like(xs[0])
        for t in range(xs.shape[0]):
            h = h * 0.5 + xs[t]
            rows.append(h)
        return Output(h, rows)

    compiled = fxjacobi.compile(run, measure=False)
    for _ in range(3):
        xs = torch.randn(7, 4)
        with torch.no_grad():
            found, wanted = compiled(xs), run(xs)
        assert type(found) is Output
        assert found.note is None
        assert equal(found.last, wanted.last)
        assert all(equal(a, b) for a, b in zip(found.rows, wanted.rows, strict=True))
