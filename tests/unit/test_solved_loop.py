"""A solved loop is the loop, gradients included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fxjacobi.certificate import Certificate
from fxjacobi.loops import Binding, Carried, Loop, Scanned, Stacked, Step
from fxjacobi.methods import (
    Affine,
    Anderson,
    Chunked,
    Contract,
    Damped,
    Jacobi,
    Method,
    Native,
    Newton,
    Picard,
    QuasiNewton,
    Sequential,
    Windowed,
)
from fxjacobi.solved_loop import SolvedLoop
from fxjacobi.testing.recurrences import (
    Recurrence,
    affine_dense,
    affine_diagonal,
    autoregressive,
    gru,
    lstm,
    rnn,
    traced_body,
)

if TYPE_CHECKING:
    from collections.abc import Callable

METHODS: list[Method] = [
    Sequential(), Jacobi(), Windowed(3), Chunked(3), Newton(), QuasiNewton(), Damped(), Picard(), Anderson(), Affine(),
    Native(),
]  # fmt: skip
MAKERS: list[Callable[..., Recurrence]] = [rnn, gru, lstm, affine_diagonal, affine_dense, autoregressive]
TIGHT = Contract(rtol=1e-12, atol=1e-13)


def needing_gradients(recurrence: Recurrence) -> list[torch.Tensor]:
    return [o.clone().requires_grad_() for o in recurrence.operands]


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("make", [gru, autoregressive, affine_diagonal])
def test_gradcheck(make: Callable[..., Recurrence], method: Method) -> None:
    recurrence = make(7, 2, 2, dtype=torch.float64)
    solved = SolvedLoop(recurrence.loop, method, TIGHT)
    assert torch.autograd.gradcheck(solved, needing_gradients(recurrence), fast_mode=True)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("memory_limit", [None, 2_000])
def test_gradients_are_those_of_the_loop(make: Callable[..., Recurrence], memory_limit: int | None) -> None:
    recurrence = make(20, 2, 3, dtype=torch.float64)
    solved = SolvedLoop(recurrence.loop, Chunked(5), TIGHT, memory_limit=memory_limit)
    gradients: list[tuple[torch.Tensor | None, ...]] = []
    for module in (solved, recurrence.loop):
        operands = needing_gradients(recurrence)
        total = torch.zeros((), dtype=torch.float64)
        for i, result in enumerate(module(*operands)):
            total = total + (result * (i + 1)).square().sum()
        gradients.append(torch.autograd.grad(total, operands))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)
    assert solved.last is not None
    assert solved.last.certificate is Certificate.RESIDUAL


def test_the_check_of_gradients_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: an adjoint that forgets what later steps pass back is seen."""
    recurrence = gru(7, 2, 2, dtype=torch.float64)
    solved = SolvedLoop(recurrence.loop, Jacobi(), TIGHT)
    operands = needing_gradients(recurrence)
    torch.autograd.grad(solved(*operands)[0].sum(), operands)
    adjoint = solved._adjoint
    assert adjoint is not None
    monkeypatch.setattr(adjoint, "_solved", lambda system, states, *_: tuple(torch.zeros_like(s) for s in states))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(solved, operands)


def test_the_adjoint_is_solved_by_the_method_and_not_step_by_step() -> None:
    recurrence = gru(64, 1, 4)
    operands = needing_gradients(recurrence)
    solved = SolvedLoop(recurrence.loop, Chunked(16), Contract(rtol=1e-4))
    solved(*operands)[0].sum().backward()
    assert solved._adjoint is not None
    assert solved._adjoint.reversed is not None
    wanted = needing_gradients(recurrence)
    recurrence.loop(*wanted)[0].sum().backward()
    for found, other in zip(operands, wanted, strict=True):
        assert found.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(found.grad, other.grad, rtol=1e-3, atol=1e-3)


def test_integer_results_and_operands_have_no_gradient() -> None:
    def step(s: torch.Tensor, n: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.tanh(s + x) * (n % 3), n + 1

    start, count, x = torch.zeros(2, dtype=torch.float64), torch.tensor(1), torch.randn(6, 2, dtype=torch.float64)
    body = traced_body(step, (start, count, x[0]))
    bindings: list[Binding] = [Carried(0, 1, (0,)), Carried(1, 1, (1,)), Scanned(2, 0, range(6))]
    loop = Loop(body, 6, bindings, [Stacked(0), Step(1, 5)])
    gradients: list[tuple[torch.Tensor, ...]] = []
    for module in (loop, *(SolvedLoop(loop, m, TIGHT) for m in (Jacobi(), Chunked(2), Newton()))):
        leaves = [start.clone().requires_grad_(), x.clone().requires_grad_()]
        values, last = module(leaves[0], count, leaves[1])
        assert last == 7
        assert not last.requires_grad
        gradients.append(torch.autograd.grad(values.sum(), leaves))
    for found in gradients[1:]:
        for value, wanted in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(value, wanted)


def test_without_gradients_nothing_is_recorded() -> None:
    recurrence = rnn(9, 1, 2)
    solved = SolvedLoop(recurrence.loop, Jacobi(), Contract(rtol=1e-5))
    with torch.no_grad():
        assert not solved(*needing_gradients(recurrence))[0].requires_grad
    assert not solved(*recurrence.operands)[0].requires_grad


def test_warm_start_takes_fewer_sweeps() -> None:
    recurrence = gru(100, 2, 8)
    solved = SolvedLoop(recurrence.loop, Jacobi(), Contract(rtol=1e-5), warm_start=True)
    sweeps: list[int] = []
    for _ in range(2):
        found = solved(*recurrence.operands)
        torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=0, atol=2e-5)
        assert solved.last is not None
        sweeps.append(solved.last.sweeps)
    assert sweeps[1] < sweeps[0] / 2


def test_an_unlawful_method_runs_the_loop() -> None:
    recurrence: Any = gru(10, 2, 4)
    solved = SolvedLoop(recurrence.loop, Newton(), Contract())
    assert torch.equal(solved(*recurrence.operands)[0], recurrence.reference()[0])
    assert solved.last is not None
    assert solved.last.certificate is Certificate.SEQUENTIAL
