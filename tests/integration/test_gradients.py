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


@pytest.mark.parametrize("method", ["chunked", "jacobi"])
def test_second_and_batched_gradients_are_refused_with_a_remedy(method: str) -> None:
    weight = 0.3 * torch.eye(6)

    def model(xs: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(3, 6)
        for x in xs:
            h = torch.tanh(h @ weight + x)
        return h

    xs = torch.randn(100, 3, 6, requires_grad=True)
    compiled = fxjacobi.compile(model, rtol=1e-5, method=method, measure=False)
    compiled(xs)
    (gradient,) = torch.autograd.grad(compiled(xs).pow(2).sum(), xs, create_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(model(xs).pow(2).sum(), xs)[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="compile without a tolerance"):
        gradient.pow(2).sum().backward()
    with pytest.raises(RuntimeError, match="vectorize=False"):
        torch.autograd.functional.jacobian(compiled, xs, vectorize=True)
    # Twice backwards, by what the first gradient is linear in: an error too, and no zeros.
    with pytest.raises(RuntimeError, match="compile without a tolerance"):
        torch.autograd.functional.jvp(compiled, xs.detach(), xs.detach())
