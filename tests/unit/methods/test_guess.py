"""Where solves start changes how many sweeps they take, and nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import fxjacobi
from fxjacobi.certificate import Certificate
from fxjacobi.errors import GuessError
from fxjacobi.methods import (
    Anderson,
    Base,
    Chunked,
    Contract,
    Damped,
    Extrapolated,
    Given,
    Guess,
    Jacobi,
    Method,
    Native,
    Newton,
    Picard,
    Previous,
    QuasiNewton,
    Swept,
    Windowed,
)
from fxjacobi.solve import solve
from fxjacobi.system import System
from fxjacobi.testing.recurrences import affine_diagonal, autoregressive, gru

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

METHODS: list[Method] = [
    Jacobi(), Windowed(20), Chunked(10), Newton(), QuasiNewton(), Damped(), Picard(), Anderson(), Native(),
]  # fmt: skip


def _cell(seed: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    torch.manual_seed(seed)
    cell = nn.GRUCell(4, 8)

    def run(xs: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(xs.shape[1], 8)
        rows = []
        for t in range(xs.shape[0]):
            h = cell(xs[t], h)
            rows.append(h)
        return torch.stack(rows)

    return run


def test_a_polynomial_along_t_meets_a_chain_that_is_one() -> None:
    """``s_t = s_{t-1} + a + b t`` is a parabola: order 2 guesses it, and order 1 only where b is zero."""
    recurrence = affine_diagonal(40, 1, 3, dtype=torch.float64)
    start = recurrence.operands[0]
    ramp = torch.arange(40, dtype=torch.float64).reshape(40, 1, 1).expand(40, 1, 3)
    for slope, order in ((0.0, 1), (0.5, 2)):
        # (1 - z) s + z x with z -> 0 and z x = a + b t
        z = torch.full((40, 1, 3), 1e-12, dtype=torch.float64)
        operands = (start, (0.3 + slope * ramp) / z, z)
        wanted = recurrence.loop(*operands)[0]
        for run in (1, 3):
            (found,) = Extrapolated(run, order).states(System(recurrence.loop, operands))
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        (line,) = Extrapolated(1).states(System(recurrence.loop, operands))
        assert torch.allclose(line, wanted, rtol=1e-6, atol=1e-6) == (order == 1)


def test_extrapolating_over_sweeps_is_nearer_than_the_sweeps() -> None:
    recurrence = affine_diagonal(60, 2, 3, dtype=torch.float64)
    operands = (recurrence.operands[0], recurrence.operands[1] * 0 + 1, recurrence.operands[2] * 0 + 0.1)
    system, wanted = System(recurrence.loop, operands), recurrence.loop(*operands)[0]
    swept = system.next_states(system.next_states(system.base()))[0]
    (found,) = Swept(2).states(system)
    assert float((found - wanted)[40:].abs().max()) < float((swept - wanted)[40:].abs().max()) / 20


@pytest.mark.parametrize("guess", [Base(), Extrapolated(2), Extrapolated(1, 3), Swept(), Swept(4)], ids=repr)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_every_guess_with_every_method(guess: Guess, method: Method) -> None:
    recurrence = autoregressive(50, 2, 3, dtype=torch.float64)
    found, _ = solve(recurrence.loop, recurrence.operands, method, Contract(rtol=1e-10), guess=guess)
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=1e-8, atol=1e-8)


HOSTILE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nan": lambda b: torch.full_like(b, math.nan),
    "inf": lambda b: torch.full_like(b, math.inf),
    "huge": lambda b: torch.full_like(b, 3e38),
    "wrong": lambda b: torch.randn(b.shape, generator=torch.Generator().manual_seed(1)).to(b) * 50,
    "some nan": lambda b: torch.where(torch.arange(b.shape[0]).reshape(-1, 1, 1) % 3 == 0, math.nan, b),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_hostile_guess_gives_an_answer_within_the_contract(kind: str, method: Method) -> None:
    recurrence = gru(80, 2, 4)

    def hostile(base: Any, _: Any) -> Any:
        return tuple(HOSTILE[kind](b) for b in base)

    found, solution = solve(recurrence.loop, recurrence.operands, method, Contract(rtol=1e-5), guess=Given(hostile))
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=0, atol=3e-5)
    assert solution.residual is not None
    assert solution.residual <= 1e-5


def test_the_check_of_hostile_guesses_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a method that hands its guess back would be seen, were it not for the check of the residual."""
    recurrence = gru(80, 2, 4)
    monkeypatch.setattr(Jacobi, "step", lambda _self, _system, iterate, _contract: _done(iterate))
    guess = Given(lambda base, _: tuple(HOSTILE["wrong"](b) for b in base))
    found, solution = solve(recurrence.loop, recurrence.operands, Jacobi(), Contract(rtol=1e-5), guess=guess)
    assert solution.certificate is Certificate.FELL_BACK
    torch.testing.assert_close(found[0], recurrence.reference()[0])


def _done(iterate: Any) -> Any:
    from dataclasses import replace

    return replace(iterate, update=0.0, prefix=iterate.states[0].shape[0])


def test_a_function_sees_the_inputs_and_leaves_the_random_state() -> None:
    recurrence = gru(30, 2, 4)
    seen: list[tuple[torch.Size, torch.Size]] = []

    def forecast(base: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.append((base[0].shape, inputs[0].shape))
        return (torch.tanh(inputs[0][..., :4]) + torch.randn(base[0].shape) * 0.01,)

    before = torch.get_rng_state()
    solve(recurrence.loop, recurrence.operands, Jacobi(), Contract(rtol=1e-5), guess=Given(forecast))
    assert torch.equal(before, torch.get_rng_state())
    assert seen == [((30, 2, 4), (30, 2, 12))]
    found, _ = solve(
        recurrence.loop, recurrence.operands, Jacobi(), Contract(rtol=1e-5), guess=Given(lambda *_: None)
    )  # fmt: skip
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=0, atol=3e-5)


def test_a_function_that_writes_to_its_inputs_is_refused() -> None:
    recurrence = gru(30, 2, 4)

    def writes(base: Any, inputs: Any) -> Any:
        inputs[0].mul_(2)
        return base

    operands = tuple(o.clone() for o in recurrence.operands)
    with pytest.raises(GuessError, match="wrote to what it was given"):
        solve(recurrence.loop, operands, Jacobi(), Contract(rtol=1e-5), guess=Given(writes))
    assert all(torch.equal(o, r) for o, r in zip(operands, recurrence.operands, strict=True)), "nothing is spoilt"


@pytest.mark.parametrize("function", [lambda *_: 5, lambda *_: (5,), lambda base, _: (base[0][:5],), lambda *_: 1 / 0])
def test_what_a_function_gives_is_checked(function: Any) -> None:
    recurrence = gru(30, 2, 4)
    with pytest.raises(GuessError):
        solve(recurrence.loop, recurrence.operands, Jacobi(), Contract(rtol=1e-5), guess=Given(function))


@pytest.mark.parametrize(("kind", "option"), [(Extrapolated, 1.5), (Extrapolated, True), (Swept, 2.5), (Given, 5)])
def test_types_of_options_of_guesses_are_checked(kind: Any, option: Any) -> None:
    with pytest.raises(TypeError):
        kind(option)


@pytest.mark.parametrize("make", [lambda: Extrapolated(0), lambda: Extrapolated(1, 0), lambda: Swept(1)])
def test_options_of_guesses_are_checked(make: Callable[[], Guess]) -> None:
    with pytest.raises(ValueError, match="at least"):
        make()


# -- through the public interface --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["jacobi", "windowed", "anderson"])
def test_a_warm_start_saves_sweeps_on_a_stream_that_drifts(method: str) -> None:
    run = _cell()
    torch.manual_seed(1)
    xs = torch.randn(100, 2, 4)
    drift = [xs + 1e-3 * k * torch.randn(100, 2, 4) for k in range(4)]
    sweeps: dict[bool, int] = {}
    with torch.no_grad():
        for warm in (False, True):
            compiled = fxjacobi.compile(run, rtol=1e-5, method=method, measure=False, warm_start=warm)
            total = 0
            for inputs in drift:
                torch.testing.assert_close(compiled(inputs), run(inputs), rtol=0, atol=3e-5)
                total += compiled.report.sweeps  # of the first call: none, it is the ordinary run
            sweeps[warm] = total
    assert sweeps[True] <= 0.7 * sweeps[False]


def test_a_warm_start_saves_sweeps_in_training_steps_forward_and_backward() -> None:
    run = _cell()
    torch.manual_seed(1)
    xs = torch.randn(100, 2, 4)
    compiled = fxjacobi.compile(run, rtol=1e-5, method="jacobi", measure=False, warm_start=True)
    sweeps = []
    for _ in range(3):
        leaf, other = xs.clone().requires_grad_(), xs.clone().requires_grad_()
        compiled(leaf).square().sum().backward()
        run(other).square().sum().backward()
        assert leaf.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-3, atol=1e-3)
        sweeps.append(compiled.report.sweeps)
    assert 0 < sweeps[2] <= 5


def test_a_sampling_loop_starts_from_the_sample_before_and_keeps_its_bits() -> None:
    torch.manual_seed(0)
    weight = torch.triu(torch.randn(40, 40), 1) * 0.3

    def sample(noise: torch.Tensor) -> torch.Tensor:
        x = torch.zeros_like(noise)
        for t in range(40):
            x[:, t] = torch.tanh(x @ weight)[:, t] + noise[:, t]
        return x

    noise = torch.randn(3, 40)
    near = noise.clone()
    near[:, 20:] += 1e-3
    sweeps: dict[bool, list[int]] = {}
    with torch.no_grad():
        for warm in (False, True):
            compiled = fxjacobi.compile(sample, measure=False, warm_start=warm)
            sweeps[warm] = []
            for each in (noise, noise, near, torch.full_like(noise, math.inf), noise):
                assert torch.equal(torch.nan_to_num(compiled(each)), torch.nan_to_num(sample(each)))
                sweeps[warm].append(compiled.report.sweeps)
    assert sweeps[True][1] == 2, "one sweep from the array's own values, and one that changes nothing"
    assert sweeps[True][2] < sweeps[False][2]
    assert max(sweeps[True]) <= 41


def test_the_exact_contract_keeps_its_bits_with_any_start() -> None:
    run = _cell()
    xs = torch.randn(60, 2, 4)
    with torch.no_grad():
        compiled = fxjacobi.compile(run, measure=False, warm_start=True, guess=Extrapolated())
        for inputs in (xs, xs + 1e-3, xs):
            assert torch.equal(compiled(inputs), run(inputs))


def test_a_guess_is_used_by_the_compiled_module() -> None:
    run = _cell()
    xs = torch.randn(100, 2, 4)
    with torch.no_grad():
        wanted = run(xs)
        oracle = Given(lambda base, _: (wanted.clone(),) if base[0].shape == wanted.shape else None)
        sweeps = []
        for guess in (None, oracle):
            compiled = fxjacobi.compile(run, rtol=1e-5, method="jacobi", measure=False, guess=guess)
            compiled(xs)
            torch.testing.assert_close(compiled(xs), wanted, rtol=0, atol=3e-5)
            sweeps.append(compiled.report.sweeps)
    assert sweeps[1] < sweeps[0]


def test_saved_plans_keep_the_start(tmp_path: Path) -> None:
    run, xs, path = _cell(), torch.randn(64, 2, 4), tmp_path / "plan.json"
    with torch.no_grad():
        compiled = fxjacobi.compile(
            run, rtol=1e-4, method="jacobi", measure=False, warm_start=True, guess=Extrapolated(2, 3)
        )
        compiled(xs)
        compiled.save_plan(path)
        loaded = fxjacobi.compile(run, rtol=1e-4, plan=path)
        assert loaded._options.warm_start
        assert loaded._options.guess == Extrapolated(2, 3)
        loaded(xs)
        first = loaded(xs)
        cold = loaded.report.sweeps
        torch.testing.assert_close(first, run(xs), rtol=0, atol=1e-3)
        loaded(xs)
        assert loaded.report.sweeps <= cold
        given = fxjacobi.compile(run, rtol=1e-4, method="jacobi", measure=False, guess=Given(lambda base, _: base))
        given(xs)
        given.save_plan(path)
    with pytest.raises(fxjacobi.PlanError, match="pass it again"):
        fxjacobi.compile(run, rtol=1e-4, plan=path)
    fxjacobi.compile(run, rtol=1e-4, plan=path, guess=Given(lambda base, _: base))
    with pytest.raises(fxjacobi.PlanError, match="was measured with rtol"):
        fxjacobi.compile(run, rtol=1e-3, plan=path, guess=Base())


@pytest.mark.parametrize(("name", "value"), [("warm_start", 1), ("guess", "previous"), ("guess", Previous)])
def test_options_are_checked(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        fxjacobi.compile(torch.sin, **{name: value})


@torch.no_grad()
@pytest.mark.parametrize("method", ["auto", "jacobi"])
def test_a_wrong_guess_is_told_to_whoever_calls(method: str) -> None:
    def steps(xs: torch.Tensor) -> torch.Tensor:
        h = torch.zeros_like(xs[0])
        for x in xs:
            h = torch.tanh(0.5 * h + x)
        return h

    compiled = fxjacobi.compile(steps, rtol=1e-5, method=method, guess=Given(lambda *_: (torch.zeros(5, 3, 6),)))
    with pytest.raises(GuessError, match="shapes"):
        compiled(torch.randn(400, 3, 6))
