"""The driver: right answers for every method and recurrence, and the right reasons."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from fxjacobi.batched_body import BatchedBody, Strategy
from fxjacobi.bits import equal_elements
from fxjacobi.certificate import Certificate
from fxjacobi.loops import Carried, Invariant, Loop, Scanned, Stacked
from fxjacobi.methods import (
    Affine,
    Anderson,
    Chunked,
    Contract,
    Damped,
    Extrapolated,
    Given,
    Iterate,
    Jacobi,
    Method,
    Native,
    Newton,
    Picard,
    Previous,
    QuasiNewton,
    Sequential,
    Windowed,
    candidates,
)
from fxjacobi.methods.guess import Base
from fxjacobi.solve import lawful, solve, solve_system
from fxjacobi.system import System
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
    from collections.abc import Callable, Sequence

    from fxjacobi.system import States

METHODS: list[Method] = [
    Sequential(),
    Jacobi(),
    Windowed(7),
    Windowed(7, sliding=False),
    Chunked(5),
    Newton(),
    QuasiNewton(),
    QuasiNewton(probes=2),
    Damped(),
    Picard(),
    Anderson(),
    Affine(),
    Native(),
]
MAKERS: list[Callable[..., Recurrence]] = [rnn, gru, lstm, affine_diagonal, affine_dense, autoregressive]
STEPWISE: list[Method] = [Jacobi(), Windowed(7), Windowed(7, sliding=False), Chunked(5)]


def ids(value: object) -> str:
    return repr(value) if isinstance(value, Method) else getattr(value, "__name__", str(value))


class OneByOne:
    """An evaluator that keeps bits: each step by itself."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def __call__(self, arguments: Sequence[Any], rows: int) -> tuple[Any, ...]:
        outputs = [
            self.loop.body(
                *(a if isinstance(b, Invariant) else a[r] for a, b in zip(arguments, self.loop.bindings, strict=True))
            )
            for r in range(rows)
        ]
        return tuple(torch.stack(column) for column in zip(*outputs, strict=True))


@pytest.mark.parametrize("method", METHODS, ids=ids)
@pytest.mark.parametrize("make", MAKERS, ids=ids)
@pytest.mark.parametrize("steps", [1, 2, 23])
def test_every_method_solves_every_recurrence(make: Callable[..., Recurrence], method: Method, steps: int) -> None:
    recurrence = make(steps, 2, 3, dtype=torch.float64)
    found, solution = solve(recurrence.loop, recurrence.operands, method, Contract(rtol=1e-11, atol=1e-12))
    for value, wanted in zip(found, recurrence.reference(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)
    assert solution.completed + solution.sweeps > 0
    if solution.certificate is Certificate.RESIDUAL:
        assert solution.residual is not None
        assert solution.residual <= 1e-10


@pytest.mark.parametrize("method", STEPWISE, ids=ids)
@pytest.mark.parametrize("make", MAKERS, ids=ids)
def test_the_exact_contract_gives_the_sequential_bits(make: Callable[..., Recurrence], method: Method) -> None:
    recurrence = make(23, 2, 3)
    contract = Contract(exactly_batched=True, patience=None)
    batch = OneByOne(recurrence.loop)
    found, solution = solve(recurrence.loop, recurrence.operands, method, contract, batch=batch)
    for value, wanted in zip(found, recurrence.reference(), strict=True):
        assert bool(equal_elements(value, wanted).all())
    assert solution.completed == 0
    assert solution.certificate in (Certificate.REPEATED, Certificate.EXACT_PREFIX)
    assert solution.sweeps <= 23
    assert list(solution.prefixes) == sorted(solution.prefixes)


def test_an_evaluator_that_rounds_otherwise_is_seen_in_the_exact_contract() -> None:
    """Planted: batching that loses bits does lose them, so the flag means something."""
    recurrence = rnn(23, 2, 3)

    class Rounding(OneByOne):
        @override
        def __call__(self, arguments: Sequence[Any], rows: int) -> tuple[Any, ...]:
            return tuple(o * (1 + 2**-22) for o in super().__call__(arguments, rows))

    contract = Contract(exactly_batched=True, patience=None)
    found, _ = solve(recurrence.loop, recurrence.operands, Jacobi(), contract, batch=Rounding(recurrence.loop))
    assert not bool(equal_elements(found[0], recurrence.reference()[0]).all())


@pytest.mark.parametrize("method", [Newton(), QuasiNewton(), Damped(), Picard(), Anderson(), Affine()], ids=ids)
def test_methods_that_lose_bits_are_not_lawful_in_the_exact_contract(method: Method) -> None:
    recurrence = affine_diagonal(9, 1, 2)
    contract = Contract(exactly_batched=True)
    assert not lawful(method, recurrence.loop, contract)
    found, solution = solve(recurrence.loop, recurrence.operands, method, contract)
    assert solution.certificate is Certificate.SEQUENTIAL
    assert torch.equal(found[0], recurrence.reference()[0])


def test_nothing_but_sequential_is_lawful_where_batching_loses_bits() -> None:
    recurrence = rnn(9, 1, 2)
    assert not lawful(Jacobi(), recurrence.loop, Contract())
    assert lawful(Jacobi(), recurrence.loop, Contract(exactly_batched=True))
    assert lawful(Jacobi(), recurrence.loop, Contract(rtol=1e-5))


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).abs().max())


@settings(deadline=None, max_examples=25)
@given(
    make=st.sampled_from([rnn, gru, lstm]),
    method=st.sampled_from([m for m in METHODS if not isinstance(m, Affine)]),
    scale=st.floats(1.0, 4.0),
    seed=st.integers(0, 1000),
    rtol=st.sampled_from([1e-7, 1e-5, 1e-3]),
    steps=st.sampled_from([1, 2, 100, 200]),
)
def test_expanding_cells_are_right(
    make: Callable[..., Recurrence], method: Method, scale: float, seed: int, rtol: float, steps: int
) -> None:
    """Past the edge of stability sweeps diverge or converge to nothing; the answer is as good as the ordinary run's."""
    recurrence = make(steps, 2, 8, scale=scale, seed=seed)
    exact = make(steps, 2, 8, scale=scale, seed=seed, dtype=torch.float64).reference()[0]
    found, solution = solve(recurrence.loop, recurrence.operands, method, Contract(rtol=rtol))
    ordinary = error(recurrence.reference()[0], exact)
    tolerated = 2 * rtol * float(exact.abs().max()) if rtol > 1e-7 else 0.0
    assert error(found[0], exact) <= max(2 * ordinary + 4e-7, tolerated), solution


def test_a_chaotic_cell_falls_back_and_says_so() -> None:
    recurrence = rnn(200, 1, 16, scale=4.0)
    found, solution = solve(recurrence.loop, recurrence.operands, Jacobi(), Contract(rtol=1e-5))
    assert solution.certificate is Certificate.FELL_BACK
    assert solution.completed > 100
    assert solution.sweeps < 40
    step = recurrence.loop.trip_count - solution.completed
    # Completed in order from the prefix: from there on the equations hold as the loop computes them.
    again = recurrence.loop.body(found[0][step], recurrence.operands[1][step + 1], recurrence.operands[2])[0]
    assert torch.equal(again, found[0][step + 1])


@dataclass(frozen=True)
class Liar(Method):
    """Says that it is done with a trajectory that is wrong from step ``at`` on."""

    keeps_bits: ClassVar[bool] = False
    at: int = 5

    @override
    def applies(self, loop: Loop) -> bool:
        return True

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        return Iterate(guess)

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        right, _ = system.complete(iterate.states, {}, 0)
        wrong = right[0].clone()
        wrong[self.at :] += 1e-3
        return replace(iterate, states=(wrong,), prefix=system.steps, update=0.0)

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.update == 0.0


def test_a_wrong_answer_is_caught_by_the_residual_and_completed_from_where_it_fails() -> None:
    recurrence = rnn(20, 1, 4)
    found, solution = solve(recurrence.loop, recurrence.operands, Liar(), Contract(rtol=1e-5))
    assert solution.certificate is Certificate.FELL_BACK
    assert solution.completed == 15
    torch.testing.assert_close(found[0], recurrence.reference()[0])


def test_a_batching_that_does_not_give_what_the_body_gives_is_caught() -> None:
    recurrence = rnn(20, 1, 4)

    class Wrong(OneByOne):
        @override
        def __call__(self, arguments: Sequence[Any], rows: int) -> tuple[Any, ...]:
            return tuple(o * 0.5 for o in super().__call__(arguments, rows))

    batch = Wrong(recurrence.loop)
    found, solution = solve(recurrence.loop, recurrence.operands, Jacobi(), Contract(rtol=1e-5), batch=batch)
    assert solution.certificate is Certificate.FELL_BACK
    assert solution.completed == 20
    assert torch.equal(found[0], recurrence.reference()[0])


def test_the_bound_on_sweeps_is_kept() -> None:
    recurrence = gru(50, 1, 4)
    _, solution = solve(recurrence.loop, recurrence.operands, Jacobi(), Contract(rtol=1e-6, max_sweeps=3))
    assert solution.sweeps == 3
    assert solution.certificate is Certificate.FELL_BACK
    assert solution.completed > 0


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, Affine)], ids=ids)
def test_an_answer_that_is_not_finite_is_returned_as_it_is(method: Method) -> None:
    """s = 2 s + 1 overflows after 128 steps: infinity is the answer, and NaN after inf - inf."""

    def step(s: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (s * s + x,)

    x = torch.full((30, 1, 2), 1.5)
    x[20] = -math.inf
    body = traced_body(step, (torch.zeros(1, 2), x[0]))
    loop = Loop(body, 30, [Carried(0, 1, (0,)), Scanned(1, 0, range(30))], [Stacked(0)])
    operands = (torch.zeros(1, 2), x)
    wanted = loop(*operands)[0]
    assert bool(torch.isnan(wanted).any())
    assert bool(torch.isinf(wanted).any())
    found, _ = solve(loop, operands, method, Contract(rtol=1e-5))
    finite = torch.isfinite(wanted)
    assert torch.equal(torch.isnan(found[0]), torch.isnan(wanted))
    torch.testing.assert_close(found[0][finite], wanted[finite])


@pytest.mark.parametrize("method", STEPWISE, ids=ids)
def test_integer_states(method: Method) -> None:
    def step(s: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.remainder(s * 3 + x, 7),)

    x = torch.arange(40).reshape(40, 1)
    body = traced_body(step, (torch.zeros(1, dtype=torch.int64), x[0]))
    loop = Loop(body, 40, [Carried(0, 1, (0,)), Scanned(1, 0, range(40))], [Stacked(0)])
    operands = (torch.zeros(1, dtype=torch.int64), x)
    found, _ = solve(loop, operands, method, Contract(exactly_batched=True))
    assert torch.equal(found[0], loop(*operands)[0])


@pytest.mark.parametrize("method", METHODS, ids=ids)
def test_a_memory_limit_changes_nothing_but_the_ranges(method: Method) -> None:
    recurrence = gru(40, 2, 4)
    contract = Contract(rtol=1e-5)
    free, _ = solve(recurrence.loop, recurrence.operands, method, contract)
    bound, _ = solve(recurrence.loop, recurrence.operands, method, contract, memory_limit=6_000)
    torch.testing.assert_close(bound[0], free[0], rtol=1e-4, atol=1e-5)
    assert 1 <= System(recurrence.loop, recurrence.operands, memory_limit=6_000).rows_limit < 40


def test_running_out_of_memory_halves_the_ranges_and_goes_on() -> None:
    recurrence = gru(40, 2, 4)
    seen: list[int] = []
    body = BatchedBody.of(recurrence.loop)

    def batch(arguments: Sequence[Any], rows: int) -> tuple[Any, ...]:
        seen.append(rows)
        if rows > 11:
            raise torch.OutOfMemoryError("planted")
        return body(arguments, rows)

    system = System(recurrence.loop, recurrence.operands, batch=batch)
    for method in (Jacobi(), Chunked(2)):
        solved = solve_system(system, method, Contract(rtol=1e-5), Base())
        torch.testing.assert_close(solved.states[0], recurrence.reference()[0], rtol=1e-4, atol=1e-5)
        assert max(seen) > 11
    assert system.rows_limit <= 11


def test_guesses_change_the_sweeps_and_not_the_answer() -> None:
    recurrence = gru(100, 2, 8)
    reference = recurrence.reference()[0]
    sweeps: dict[str, int] = {}
    for guess in (Base(), Previous((reference,)), Extrapolated(), Given(lambda *_: (reference + 1e-3,))):
        found, solution = solve(recurrence.loop, recurrence.operands, Jacobi(), Contract(rtol=1e-5), guess=guess)
        torch.testing.assert_close(found[0], reference, rtol=0, atol=2e-5)
        sweeps[type(guess).__name__] = solution.sweeps
    assert sweeps["Previous"] < sweeps["Given"] < sweeps["Base"]


def test_a_guess_that_is_not_finite_is_replaced() -> None:
    recurrence = gru(60, 1, 4)
    guess = Given(lambda *_: (torch.full((60, 1, 4), math.nan),))
    for method in STEPWISE:
        found, solution = solve(recurrence.loop, recurrence.operands, method, Contract(rtol=1e-5), guess=guess)
        assert solution.certificate is Certificate.RESIDUAL
        torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=0, atol=2e-5)


def test_a_guess_of_other_shapes_is_refused_or_dropped() -> None:
    recurrence = gru(10, 1, 4)
    with pytest.raises(ValueError, match="shapes"):
        solve(
            recurrence.loop,
            recurrence.operands,
            Jacobi(),
            Contract(rtol=1e-5),
            guess=Given(lambda *_: (torch.ones(3),)),
        )
    solve(recurrence.loop, recurrence.operands, Jacobi(), Contract(rtol=1e-5), guess=Previous((torch.ones(3),)))


def test_a_body_that_mixes_rows_is_not_folded() -> None:
    """Planted: a softmax over dimension 0 is the identity of one row, and mixes rows once they are folded."""

    def step(s: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.softmax(s, 0) * 0.5 * s + x,)

    x = torch.randn(30, 1, 4, generator=torch.Generator().manual_seed(0))
    body = traced_body(step, (torch.zeros(1, 4), x[0]))
    loop = Loop(body, 30, [Carried(0, 1, (0,)), Scanned(1, 0, range(30))], [Stacked(0)])
    system = System(loop, (torch.zeros(1, 4), x))
    layout = system.body.layout(system.arguments(system.base(), 0, 30), 30)
    assert layout.strategy is Strategy.VMAP
    found, _ = solve(loop, (torch.zeros(1, 4), x), Chunked(6), Contract(rtol=1e-5))
    torch.testing.assert_close(found[0], loop(torch.zeros(1, 4), x)[0])


@pytest.mark.parametrize("make", MAKERS, ids=ids)
def test_candidates(make: Callable[..., Recurrence]) -> None:
    recurrence = make(100, 2, 3)
    for exact in (True, False):
        found = candidates(recurrence.loop, exact)
        assert Sequential() in found
        assert all(m.keeps_bits for m in found) or not exact
        assert any(isinstance(m, Affine) for m in found) == (not exact and make in (affine_diagonal, affine_dense))
    system, contract = System(recurrence.loop, recurrence.operands), Contract(rtol=1e-4)
    measured = candidates(recurrence.loop, False, system=system, contract=contract)
    assert any(isinstance(m, Chunked) for m in measured)
    assert candidates(make(1, 2, 3).loop, False) == [Sequential()]


def test_a_contract_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="rtol"):
        Contract(rtol=-1.0)
    with pytest.raises(ValueError, match="atol"):
        Contract(atol=math.nan)
    with pytest.raises(ValueError, match="patience"):
        Contract(patience=0)
    with pytest.raises(ValueError, match="max_sweeps"):
        Contract(max_sweeps=-1)
