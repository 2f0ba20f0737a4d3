"""Updates that are rounding at every single step, and add up to much more than the tolerance along the steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxjacobi
from fxjacobi.certificate import Certificate
from fxjacobi.loops import Carried, Invariant, Loop, Scanned, Stacked
from fxjacobi.methods import (
    Anderson,
    Chunked,
    Contract,
    Damped,
    Guess,
    Jacobi,
    Method,
    Native,
    Newton,
    Picard,
    Previous,
    QuasiNewton,
    Windowed,
)
from fxjacobi.solve import solve
from fxjacobi.testing.recurrences import Recurrence, traced_body

if TYPE_CHECKING:
    from fxjacobi.certificate import Solution

METHODS: list[Method] = [
    Jacobi(), Windowed(128), Windowed(128, sliding=False), Chunked(100), Chunked(50, 20), Newton(), QuasiNewton(),
    Damped(), Picard(), Anderson(), Native(),
]  # fmt: skip
RTOL = 1e-5


def averaged(decay: float, drift: float, steps: int, *, turn: bool, seed: int) -> tuple[Recurrence, torch.Tensor]:
    """Return ``s_t = decay s_{t-1} + (1 - decay) x_t`` and its float64 answer; from 20 it moves ``drift`` epsilons a step.

    With ``turn`` the state's second half is the first's rotated by a quarter of a turn: no element reads itself.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.full((3, 4), 20.0)
    x = 20 * (1 + drift * torch.finfo(torch.float32).eps / (1 - decay)) + 1e-4 * torch.rand(
        steps, 3, 4, generator=generator
    )
    quarter = torch.tensor([[0.0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]) if turn else torch.eye(4)

    def step(s: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.mm(s, w) + (1 - decay) * x,)

    operands = (start, x, decay * quarter)
    loops: list[Loop] = []
    for dtype in (torch.float32, torch.float64):
        values = tuple(v.to(dtype) for v in operands)
        body = traced_body(step, (values[0], values[1][0], values[2]))
        loops.append(Loop(body, steps, [Carried(0, 1, (0,)), Scanned(1, 0, range(steps)), Invariant(2)], [Stacked(0)]))
    return Recurrence(loops[0], operands), loops[1](*(v.double() for v in operands))[0]


def check(method: Method, recurrence: Recurrence, truth: torch.Tensor, guess: Guess | None = None) -> Solution:
    found, solution = solve(recurrence.loop, recurrence.operands, method, Contract(rtol=RTOL), guess=guess)
    scale = float(truth.abs().max())
    ordinary = float((recurrence.reference()[0] - truth).abs().max()) / scale
    error = float((found[0] - truth).abs().max()) / scale
    assert error <= RTOL + 2 * ordinary, f"{method}: {error:.3g}, the ordinary run {ordinary:.3g}; {solution}"
    return solution


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_drift_below_rounding_is_not_rounding(method: Method, turn: bool) -> None:
    recurrence, truth = averaged(0.999, 4.0, 1500, turn=turn, seed=0)
    check(method, recurrence, truth)


@settings(deadline=None, max_examples=10)
@given(
    decay=st.sampled_from([0.5, 0.9, 0.99, 0.999, 0.9999]), drift=st.floats(-8.0, 8.0), method=st.sampled_from(METHODS),
    turn=st.booleans(), seed=st.integers(0, 100),
)  # fmt: skip
def test_slow_recurrences(decay: float, drift: float, method: Method, turn: bool, seed: int) -> None:
    recurrence, truth = averaged(decay, drift, 700, turn=turn, seed=seed)
    check(method, recurrence, truth)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_warm_start_that_drifted(method: Method) -> None:
    """Begun from the solution of inputs that were hardly other ones, no equation is off by more than rounding."""
    recurrence, _ = averaged(0.999, 0.0, 1500, turn=False, seed=0)
    before = Previous(recurrence.reference())
    after, truth = averaged(0.999, 4.0, 1500, turn=False, seed=0)
    check(method, after, truth, before)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_warm_start_of_a_cell_that_forgets_takes_few_sweeps(method: Method) -> None:
    """What is passed on is measured where no update is large enough to tell: nothing runs in order for want of it."""
    recurrence, truth = averaged(0.5, 4.0, 700, turn=False, seed=0)
    solution = check(method, recurrence, truth, Previous(recurrence.reference()))
    native = isinstance(method, Native)
    assert solution.certificate is (Certificate.IN_MACHINE_CODE if native else Certificate.RESIDUAL)
    assert solution.sweeps <= (2 * 700 // 64 if isinstance(method, Windowed) else 3)


def test_the_compiled_model_drifts_as_the_ordinary_one() -> None:
    def descend(w: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        for a in rows:
            w = w - 1e-4 * w * a
        return w

    compiled = fxjacobi.compile(descend, rtol=RTOL, method="jacobi", measure=False)
    generator = torch.Generator().manual_seed(0)
    compiled(torch.randn(4, generator=generator), 6e-3 * torch.rand(2000, 4, generator=generator))
    w, rows = torch.randn(4, generator=generator), 6e-3 * torch.rand(2000, 4, generator=generator)
    found = compiled(w, rows)
    truth = descend(w.double(), rows.double())
    scale = float(truth.abs().max())
    ordinary = float((descend(w, rows) - truth).abs().max()) / scale
    assert float((found - truth).abs().max()) / scale <= RTOL + 2 * ordinary
