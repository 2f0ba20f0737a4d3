"""Samples of a batch that are small, and grow, beside large ones that forget."""

from __future__ import annotations

import pytest
import torch

import fxjacobi
from fxjacobi.methods import Contract
from fxjacobi.methods.comparison import compared
from fxjacobi.methods.frozen import apart
from fxjacobi.system import System
from fxjacobi.testing.recurrences import affine_dense, gru, lstm
from tests.unit.methods.test_frozen import one_slow_sample


def run(h: torch.Tensor, xs: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    rows = []
    for x in xs:
        h = torch.tanh(a * h + x)
        rows.append(h)
    return torch.stack(rows)


def beside_an_unstable_rest(gain: float, at: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return three samples: one has no input, and starts next to where it would stay."""
    generator = torch.Generator().manual_seed(0)
    xs, h = torch.randn(1000, 3, 8, generator=generator), torch.zeros(3, 8)
    xs[:, at], h[at] = 0, 1e-6
    gains = torch.full((3, 1), 0.45)
    gains[at] = gain
    return h, xs, gains


@torch.no_grad()
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("method", ["auto", "chunked", "windowed", "jacobi", "quasi_newton", "anderson", "picard"])
def test_a_growing_sample_beside_larger_ones(method: str, at: int) -> None:
    compiled = fxjacobi.compile(run, rtol=1e-5, method=method, measure=False, budget_s=0.3)
    compiled(*beside_an_unstable_rest(0.6, at))
    arguments = beside_an_unstable_rest(1.03, at)
    found, ordinary = compiled(*arguments), run(*arguments)
    assert float(ordinary[-1, at, 0]) > 0.1, "it has grown"
    torch.testing.assert_close(found, ordinary, rtol=0, atol=5e-5)


def test_samples_that_are_apart() -> None:
    for recurrence, wanted in (
        (gru(9, 3, 4), True), (lstm(9, 5, 2), True), (one_slow_sample(), True), (one_slow_sample(mixing=0.1), False),
        (one_slow_sample(mixing=1e-5), False), (gru(9, 1, 4), False),
    ):  # fmt: skip
        assert apart(System(recurrence.loop, recurrence.operands)) is wanted
    dense = affine_dense(9, 3, 2)
    assert not apart(System(dense.loop, dense.operands)) or dense.operands[0].dim() > 1


def test_the_scale_of_a_sample_is_its_own_and_no_more_than_the_batchs() -> None:
    """The small sample's update is seen; a zero of a sample that has been large is not held against it."""
    a = torch.tensor([[[1.0], [1e-6]], [[1e-9], [1e-6]], [[2.0], [0.0]]])
    b = a.clone()
    b[0, 1] += 1e-8
    b[1, 0] += 1e-9
    together = compared((a,), (b,), Contract(rtol=1e-5)).units
    each = compared((a,), (b,), Contract(rtol=1e-5), samples=True).units
    torch.testing.assert_close(together, torch.tensor([1e-3, 1e2, 0.0]).double(), rtol=1e-2, atol=0)
    torch.testing.assert_close(each, torch.tensor([1e3, 1e2, 0.0]).double(), rtol=1e-2, atol=0)
    b = a.clone()
    a[2, 1] += 1e-12
    assert float(compared((a,), (b,), Contract(rtol=1e-5), samples=True).units[2]) < 1.0
