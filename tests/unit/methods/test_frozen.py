"""Samples of a batch that have converged are frozen, and the answer is that of the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from fxjacobi.certificate import Certificate, Solution
from fxjacobi.loops import Binding, Carried, Invariant, Loop, Scanned, Stacked
from fxjacobi.methods import (
    Anderson,
    Contract,
    Damped,
    Jacobi,
    Method,
    Newton,
    Picard,
    QuasiNewton,
    Windowed,
)
from fxjacobi.methods import frozen as frozen_module
from fxjacobi.methods.frozen import independent, settled
from fxjacobi.methods.settle import amplification
from fxjacobi.solve import solve
from fxjacobi.system import System
from fxjacobi.testing.recurrences import Recurrence, affine_dense, gru, lstm, traced_body

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS, BATCH = 80, 8
TOLERANCE = Contract(rtol=1e-5)


def one_slow_sample(fast: float = 0.02, slow: float = 0.8, mixing: float = 0.0) -> Recurrence:
    """``s_t = tanh(a_b s_{t-1} + x_t)`` with ``a_b`` fast but for one sample's; ``mixing`` lets a sample read another."""

    def step(s: torch.Tensor, x: torch.Tensor, a: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        s = s + mixing * s.roll(1, 0) if mixing else s
        return (torch.tanh(torch.mm(a * s, w) + x),)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(STEPS, BATCH, 3, generator=generator) * 1e-2  # in the linear range of tanh
    decay = torch.full((STEPS, BATCH, 1), fast)
    decay[:, 1] = slow
    start, weight = torch.zeros(BATCH, 3), torch.eye(3)
    body = traced_body(step, (start, x[0], decay[0], weight))
    bindings: list[Binding] = [
        Carried(0, 1, (0,)), Scanned(1, 0, range(STEPS)), Scanned(2, 0, range(STEPS)), Invariant(3)
    ]  # fmt: skip
    return Recurrence(Loop(body, STEPS, bindings, [Stacked(0)]), (start, x, decay, weight))


class Rows(TorchDispatchMode):
    """Counts the rows that go through tanh: one for each step and sample."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.tanh.default:
            self.rows += args[0].numel() // args[0].shape[-1]
        return func(*args, **(kwargs or {}))


def solved(method: Method, recurrence: Recurrence) -> tuple[torch.Tensor, Solution, int]:
    solve(recurrence.loop, recurrence.operands, method, TOLERANCE)  # ways are chosen and samples looked at once
    with Rows() as count:
        found, solution = solve(recurrence.loop, recurrence.operands, method, TOLERANCE)
    return found[0], solution, count.rows


def evaluated(method: Method, solution: Solution) -> int:
    """The most rows of a solve whose sweeps run the samples that its record says, and the open steps of those."""
    active = solution.active or (BATCH,) * solution.sweeps
    opened = [STEPS - before for before in (0, *solution.prefixes[:-1])]
    match method:
        case Jacobi():
            steps = opened
        case Windowed(window):
            steps = [min(window, left) for left in opened]
        case Picard() | Anderson():
            steps = [STEPS] * solution.sweeps
        case _:  # values, and derivatives in three directions
            steps = [4 * STEPS] * solution.sweeps
    # The first merit; and where residuals are not much smaller than rounding, a disturbance tells samples that forget.
    first = {Damped: 3, Anderson: 2}.get(type(method), 0) * STEPS * BATCH
    check = (STEPS + 3) * BATCH  # all equations together, and three steps by themselves
    swept = sum(samples * rows for samples, rows in zip(active, steps, strict=True))
    return first + swept + check + solution.completed * BATCH


@pytest.mark.parametrize(
    ("method", "certificate", "slow"),
    [(Jacobi(), Certificate.RESIDUAL, 0.8), (Jacobi(), Certificate.FELL_BACK, 0.98),
     (Windowed(60), Certificate.RESIDUAL, 0.8), (Windowed(60), Certificate.FELL_BACK, 0.98),
     (Windowed(40, sliding=False), Certificate.RESIDUAL, 0.8), (Windowed(40, sliding=False), Certificate.FELL_BACK, 0.98),
     (Anderson(), Certificate.RESIDUAL, 0.8), (Anderson(), Certificate.FELL_BACK, 0.98),
     (Damped(), Certificate.RESIDUAL, 0.8), (Damped(), Certificate.RESIDUAL, 0.98),
     (Picard(), Certificate.RESIDUAL, 0.94)],
    ids=repr,
)  # fmt: skip
def test_one_slow_sample_in_a_batch_of_fast_ones(
    method: Method, certificate: Certificate, slow: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Picard adds increments: there the samples that hardly change are the fast ones.
    recurrence = one_slow_sample(0.9999 if isinstance(method, Picard) else 0.02, slow)
    wanted = recurrence.reference()[0]
    within = TOLERANCE.rtol * float(wanted.abs().max())
    found, solution, rows = solved(method, recurrence)
    assert solution.certificate is certificate
    assert (solution.completed > 0) == (certificate is Certificate.FELL_BACK)
    torch.testing.assert_close(found, wanted, rtol=0, atol=within)
    assert solution.active[0] == BATCH
    assert min(solution.active) == 1
    assert rows <= evaluated(method, solution)
    monkeypatch.setattr(frozen_module.Samples, "of", lambda *_: None)
    plain, all_of_them, more = solved(method, recurrence)
    torch.testing.assert_close(plain, wanted, rtol=0, atol=within)
    assert all_of_them.active == ()
    assert rows < more <= evaluated(method, all_of_them)


@pytest.mark.parametrize("slow", [0.8, 0.98])
@pytest.mark.parametrize("method", [QuasiNewton(), Newton()], ids=repr)
def test_where_few_sweeps_are_enough_none_is_frozen(
    method: Method, slow: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    recurrence = one_slow_sample(slow=slow)
    found, solution, rows = solved(method, recurrence)
    assert solution.certificate is Certificate.RESIDUAL
    assert solution.active == ()
    assert rows <= evaluated(method, solution)
    monkeypatch.setattr(frozen_module.Samples, "of", lambda *_: None)
    plain, _, as_many = solved(method, recurrence)
    assert torch.equal(found, plain)
    assert rows == as_many


def test_values_of_frozen_samples_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    recurrence = one_slow_sample()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    whole = frozen_module.Samples._frozen

    def watched(self: Any, *arguments: Any) -> Any:
        after = whole(self, *arguments)
        if self.active is not None:
            seen.append((self.active.clone(), self._states[0].clone()))
        return after

    monkeypatch.setattr(frozen_module.Samples, "_frozen", watched)
    found, _ = solve(recurrence.loop, recurrence.operands, Jacobi(), TOLERANCE)
    assert seen
    active, then = seen[0]
    assert active.tolist() == [1]
    others = [b for b in range(BATCH) if b != 1]
    assert torch.equal(found[0][:, others], then[:, others])
    assert not torch.equal(found[0][:, 1], then[:, 1])


def test_samples_that_read_one_another_are_never_frozen() -> None:
    for mixing in (0.1, 1e-5):
        recurrence = one_slow_sample(mixing=mixing)
        assert not independent(System(recurrence.loop, recurrence.operands))
    assert independent(System(one_slow_sample().loop, one_slow_sample().operands))
    assert independent(System(lstm(9, 3, 2).loop, lstm(9, 3, 2).operands))
    assert not independent(System(affine_dense(9, 3, 2).loop, affine_dense(9, 3, 2).operands)), "does not fold"
    assert not independent(System(gru(9, 1, 2).loop, gru(9, 1, 2).operands)), "one sample is no batch"
    assert not independent(System(gru(1, 4, 2).loop, gru(1, 4, 2).operands)), "one step"


def test_a_sample_that_is_frozen_wrongly_is_caught_by_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: everything is called independent and settled after four sweeps."""
    recurrence = one_slow_sample(mixing=0.5)
    monkeypatch.setattr(frozen_module, "independent", lambda _: True)

    def half(new: Any, *_: Any) -> torch.Tensor:
        return torch.arange(new[0].shape[1]) % 2 == 1

    monkeypatch.setattr(frozen_module, "settled", half)
    found, solution = solve(recurrence.loop, recurrence.operands, Jacobi(), TOLERANCE)
    assert solution.certificate is Certificate.FELL_BACK
    wanted = recurrence.reference()[0]
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=TOLERANCE.rtol * float(wanted.abs().max()))


def test_settled() -> None:
    old = torch.ones(3, 4, 2)
    new = old.clone()
    new[1, 0] += 1e-7
    new[2, 1] += 1e-4
    new[0, 2] = float("nan")
    assert settled((new,), (old,), TOLERANCE, 1.0).tolist() == [True, False, False, True]
    whole = torch.zeros(3, 4, dtype=torch.int64)
    moved = whole.clone()
    moved[1, 3] = 1
    assert settled((new, moved), (old, whole), TOLERANCE, 1.0).tolist() == [True, False, False, False]


def test_a_sample_that_drifts_has_not_come_to_rest() -> None:
    old = torch.ones(100, 3, 2)
    new = old.clone()
    new[:, 0] += 2e-7
    new[0, 1] += 2e-7
    effects = torch.ones(100).double()
    for gain, rest in ((0.5, [True, True, True]), (1.0, [False, False, True]), (float("inf"), [False, False, True])):
        amplified = amplification(torch.full((100,), gain).double(), effects, (1,))
        assert settled((new,), (old,), TOLERANCE, amplified).tolist() == rest


@pytest.mark.parametrize("make", [gru, lstm])
def test_systems_of_some_samples(make: Callable[..., Recurrence]) -> None:
    recurrence = make(9, 5, 3, dtype=torch.float64)
    system = System(recurrence.loop, recurrence.operands)
    states, _ = system.complete(system.base(), {}, 0)
    kept = torch.tensor([3, 0])
    part = system.of_samples(kept)
    for found, wanted in zip(part.next_states(tuple(s[:, kept] for s in states)), states, strict=True):
        torch.testing.assert_close(found, wanted[:, kept])
