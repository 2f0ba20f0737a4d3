"""Affine recurrences are recognised by structure; what is not affine is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fxjacobi.linearity import Affinity, affinity
from fxjacobi.loops import Carried, Loop, Scanned, Stacked
from fxjacobi.testing.recurrences import affine_dense, affine_diagonal, autoregressive, gru, lstm, rnn, traced_body

if TYPE_CHECKING:
    from collections.abc import Callable


def loop_of(step: Callable[..., tuple[torch.Tensor, ...]], shape: tuple[int, ...] = (2, 4)) -> Loop:
    body = traced_body(step, (torch.ones(shape), torch.ones(shape)))
    return Loop(body, 5, [Carried(0, 1, (0,)), Scanned(1, 0, range(5))], [Stacked(0)])


@pytest.mark.parametrize(
    ("step", "diagonal"),
    [
        (lambda s, x: (s * x + x.exp(),), True),
        (lambda s, x: (x.sigmoid() * s + (1 - x.sigmoid()) * x,), True),
        (lambda s, x: (torch.where(x > 0, s, x) - s / (x + 3),), True),
        (lambda s, x: (torch.lerp(s, x, 0.3),), True),
        (lambda s, x: (torch.addcmul(x, s, x),), True),
        (lambda s, x: ((s.reshape(8) * 2).reshape(2, 4) - x,), True),
        (lambda s, x: (-(s.unsqueeze(0) * x).squeeze(0),), True),
        (lambda s, x: (s.sum(0, keepdim=True) * x,), False),
        (lambda s, x: (s.flip(1) + x,), False),
        (lambda s, x: (torch.cat([s[:, 2:], s[:, :2]], 1) + x,), False),
        (lambda s, x: (s @ (x.t() @ x) + x,), False),
        (lambda s, x: (x.cumsum(0) + torch.roll(s, 1, 0),), False),
    ],
)
def test_affine_bodies(step: Callable[..., tuple[torch.Tensor, ...]], diagonal: bool) -> None:
    assert affinity(loop_of(step)) == Affinity(diagonal)


@pytest.mark.parametrize(
    "step",
    [
        lambda s, x: (s * s + x,),
        lambda s, x: (s.tanh() + x,),
        lambda s, x: (x / s,),
        lambda s, x: (torch.where(s > 0, s, x),),
        lambda s, x: (s.abs() + x,),
        lambda s, x: (s @ s.t() @ x,),
        lambda s, x: ((s + x).pow(1.0),),
        lambda s, x: (s.round() + x,),
        lambda s, x: (torch.lerp(x, s, s),),
        lambda s, x: (s.sort(1).values + x,),
    ],
)
def test_bodies_that_are_not_affine(step: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    assert affinity(loop_of(step)) is None


def test_a_product_of_two_sources_of_state_is_not_affine() -> None:
    """Planted: each factor is affine, and only their product is not; sampling at s = 0 would not see it."""
    assert affinity(loop_of(lambda s, x: (x + 1e-9 * (s + x) * (s - x),))) is None


def test_cells() -> None:
    assert affinity(affine_diagonal(5, 2, 3).loop) == Affinity(True)
    assert affinity(affine_diagonal(5, 2, 3, distance=3).loop) == Affinity(True)
    assert affinity(affine_dense(5, 2, 3).loop) == Affinity(False)
    for make in (rnn, gru, lstm, autoregressive):
        assert affinity(make(5, 2, 3).loop) is None


def test_integers_are_not_affine() -> None:
    body = traced_body(lambda s: (s + 1,), (torch.zeros(2, dtype=torch.int64),))
    assert affinity(Loop(body, 3, [Carried(0, 1, (0,))], [Stacked(0)])) is None
