"""Chunks: the warm-up, the seams whose equations are looked at, and the samples that are left out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxjacobi.certificate import Certificate
from fxjacobi.methods import Chunked, Contract
from fxjacobi.methods.chunks import prepared, run_chunks
from fxjacobi.methods.guess import Given
from fxjacobi.scripted_loop import scripted_steps
from fxjacobi.solve import solve
from fxjacobi.system import System
from fxjacobi.testing.recurrences import affine_diagonal, autoregressive, gru, lstm, rnn
from tests.unit.methods.test_frozen import Rows, one_slow_sample

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxjacobi.testing.recurrences import Recurrence

MAKERS = {"gru": gru, "lstm": lstm, "rnn": rnn, "affine": affine_diagonal, "autoregressive": autoregressive}
TIGHT = Contract(rtol=1e-12, atol=1e-13)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(MAKERS)), st.integers(1, 45), st.integers(1, 3), st.integers(1, 20), st.integers(0, 50))
def test_any_length_chunk_and_warm_up(kind: str, steps: int, batch: int, chunk: int, warm_up: int) -> None:
    recurrence = MAKERS[kind](steps, batch, 3, dtype=torch.float64)
    found, solution = solve(recurrence.loop, recurrence.operands, Chunked(chunk, warm_up), TIGHT)
    for a, b in zip(found, recurrence.reference(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert solution.certificate in (Certificate.RESIDUAL, Certificate.FELL_BACK, Certificate.SEQUENTIAL)


def test_a_warm_up_as_long_as_the_memory_leaves_one_sweep() -> None:
    recurrence = gru(400, 2, 8)
    contract = Contract(rtol=1e-5)
    _, cold = solve(recurrence.loop, recurrence.operands, Chunked(50), contract)
    found, warm = solve(recurrence.loop, recurrence.operands, Chunked(50, 50), contract)
    assert (warm.sweeps, warm.certificate) == (1, Certificate.RESIDUAL)
    assert cold.sweeps > warm.sweeps
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("chunk", [-1, 0])
def test_a_chunk_is_positive(chunk: int) -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        Chunked(chunk)


def test_a_warm_up_is_not_negative() -> None:
    with pytest.raises(ValueError, match="warm-up"):
        Chunked(4, -1)


@pytest.mark.parametrize("steps", [40, 43, 47])
def test_only_the_seams_are_open(steps: int) -> None:
    recurrence = autoregressive(steps, 2, 3)
    system, contract = System(recurrence.loop, recurrence.operands), Contract(rtol=1e-3)
    method = Chunked(10)
    iterate = method.init(system, system.base(), contract)
    for _ in range(4):
        iterate = method.step(system, iterate, contract)
        values, states = system.next_states(iterate.states), iterate.states
        off = torch.stack([(v - s).abs().flatten(1).amax(1) for v, s in zip(values, states, strict=True)]).amax(0)
        assert iterate.open is not None
        assert set((off > 1e-6).nonzero().flatten().tolist()) <= set(iterate.open)
        assert len(iterate.open) < steps


@pytest.mark.parametrize("where", [0, 10, 13, 39])
def test_a_wrong_trajectory_is_never_certified(where: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the first sweep hands on a step that is off, at a seam or not."""
    recurrence = gru(40, 2, 4)
    real, calls = run_chunks, []

    def planted(system: System, chunks: object) -> object:
        swept = real(system, chunks)  # type: ignore[arg-type]
        calls.append(0)
        if len(calls) == 1:
            swept = replace(swept, states=tuple(s.clone() for s in swept.states))
            swept.states[0][where] += 0.5
        return swept

    monkeypatch.setattr("fxjacobi.methods.chunked.run_chunks", planted)
    found, _ = solve(recurrence.loop, recurrence.operands, Chunked(10), Contract(rtol=1e-5))
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("make", [gru, autoregressive], ids=["folded", "two distances"])
def test_inner_steps_are_one_call(make: Callable[..., Recurrence], monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner steps are scripted, and keep the bits that they have in Python."""
    recurrence = make(24, 2, 3)
    system = System(recurrence.loop, recurrence.operands)
    chunks = prepared(system, system.base(), (0, 8, 16), 8)
    (lane,) = chunks.lanes
    assert lane.inner is not None
    assert scripted_steps(lane.inner) is not None
    scripted = run_chunks(system, chunks)
    monkeypatch.setattr("fxjacobi.methods.chunks.scripted_steps", lambda _, dim: None)
    in_python = run_chunks(system, chunks)
    for a, b in zip((*scripted.states, *scripted.others), (*in_python.states, *in_python.others), strict=True):
        assert torch.equal(a, b)


def test_settled_samples_are_left_out() -> None:
    recurrence = one_slow_sample(slow=0.95)
    contract = Contract(rtol=1e-5)
    solve(recurrence.loop, recurrence.operands, Chunked(8), contract)
    with Rows() as some:
        found, solution = solve(recurrence.loop, recurrence.operands, Chunked(8), contract)
    assert solution.certificate is Certificate.RESIDUAL
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=1e-4, atol=1e-6)
    all_rows = solution.sweeps * 80 * 8
    assert some.rows < 0.6 * all_rows, (some.rows, all_rows, solution.prefixes)


def test_samples_that_read_one_another_stay_together() -> None:
    recurrence = one_slow_sample(slow=0.9, mixing=0.3)
    found, _ = solve(recurrence.loop, recurrence.operands, Chunked(8), Contract(rtol=1e-5))
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_hostile_guess_changes_nothing(value: float) -> None:
    recurrence = gru(60, 2, 4)
    guess = Given(lambda *_: (torch.full((60, 2, 4), value),))
    found, _ = solve(recurrence.loop, recurrence.operands, Chunked(12, 12), Contract(rtol=1e-5), guess=guess)
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=0, atol=2e-5)
