"""Chains of small increments: what Picard iteration is for."""

from __future__ import annotations

import pytest
import torch

from fxjacobi.certificate import Certificate
from fxjacobi.loops import Carried, Invariant, Loop, Stacked
from fxjacobi.methods import Contract, Method, Picard, QuasiNewton
from fxjacobi.solve import solve
from fxjacobi.testing.recurrences import Recurrence, traced_body


def chain(steps: int, grow: float, increment: float, size: int = 32) -> Recurrence:
    """``s_t = grow s_{t-1} + increment tanh(W s_{t-1})``, as a deterministic sampler's steps are."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(size, size, generator=generator) * size**-0.5
    start = torch.randn(1, size, generator=generator)

    def step(s: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (s * grow + increment * torch.tanh(torch.ops.aten.mm(s, w)),)

    body = traced_body(step, (start, weights))
    return Recurrence(Loop(body, steps, [Carried(0, 1, (0,)), Invariant(1)], [Stacked(0)]), (start, weights))


def largest_error(found: torch.Tensor, recurrence: Recurrence) -> float:
    """``max |s_t - wanted_t| / max |wanted_t|`` over the steps."""
    (wanted,) = recurrence.reference()
    return float(((found - wanted).flatten(1).abs().amax(1) / wanted.flatten(1).abs().amax(1)).max())


@pytest.mark.parametrize("method", [Picard(), QuasiNewton(2)], ids=["picard", "quasi-Newton"])
@pytest.mark.parametrize(
    ("steps", "grow", "increment", "rtol", "sweeps"),
    [(300, 1.01, 0.01, 1e-5, 16), (100, 1.0, 0.01, 1e-6, 12), (300, 1.0, 0.01, 1e-6, 18)],
)
def test_what_rounding_adds_up_to_along_a_chain_is_not_left_out(
    method: Method, steps: int, grow: float, increment: float, rtol: float, sweeps: int
) -> None:
    """Settled steps still move by some epsilons each; if the next ones lack their sum, no sweep settles them."""
    recurrence = chain(steps, grow, increment)
    (found,), solution = solve(recurrence.loop, recurrence.operands, method, Contract(rtol=rtol))
    assert solution.certificate is Certificate.RESIDUAL
    assert solution.sweeps <= sweeps
    assert largest_error(found, recurrence) < 1e-5


def test_steps_final_to_the_bit_grow_by_one_a_sweep() -> None:
    """An expanding chain, on which Picard iteration overflows at first, is right in as many sweeps as it has steps."""
    recurrence = chain(24, 3.0, 2.0)
    (found,), solution = solve(recurrence.loop, recurrence.operands, Picard(), Contract(rtol=1e-6, patience=None))
    assert solution.completed == 0
    assert largest_error(found, recurrence) < 2e-6
