"""How many sweeps a solve takes from each initial guess; the answer is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.bench.problems import Problem, label, problems, trajectory
from fxjacobi.certificate import Certificate
from fxjacobi.methods.chunked import Chunked
from fxjacobi.methods.comparison import compared
from fxjacobi.methods.guess import Base, Extrapolated, Given, Guess, Previous, Swept
from fxjacobi.methods.jacobi import Jacobi
from fxjacobi.methods.method import Contract
from fxjacobi.methods.picard import Picard
from fxjacobi.methods.quasi_newton import QuasiNewton
from fxjacobi.solve import solve_system
from fxjacobi.system import System

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fxjacobi.methods.method import Method
    from fxjacobi.system import States

__all__ = ["Guesses", "forecaster"]

_CONTRACT = Contract(rtol=1e-5)
_REACH = 4  # inputs that the forecasting network sees
_RIDGE = 1e-2


def forecaster(near: States, inputs: tuple[torch.Tensor, ...]) -> Callable[[States, tuple[torch.Tensor, ...]], States]:
    """Fit a linear forecast of each state from the last :data:`_REACH` inputs, on one earlier run, by ridge regression.

    Args:
        near: The earlier run's trajectory.
        inputs: What its loop read a slice of at every step, each ``(T, ...)``.
    """

    def features(values: tuple[torch.Tensor, ...]) -> torch.Tensor:
        flat = torch.cat([value.reshape(value.shape[0], -1) for value in values], 1)
        late = [torch.nn.functional.pad(flat, (0, 0, k, 0))[: flat.shape[0]] for k in range(_REACH)]
        return torch.cat([*late, torch.ones_like(flat[:, :1])], 1)

    known = features(inputs).double()
    gram = known.T @ known + _RIDGE * torch.eye(known.shape[1], dtype=known.dtype, device=known.device)
    weights = [torch.linalg.solve(gram, known.T @ state.flatten(1).double()) for state in near]

    def forecast(base: States, values: tuple[torch.Tensor, ...]) -> States:
        seen = features(values).double()
        return tuple((seen @ w).view(b.shape).to(b) for w, b in zip(weights, base, strict=True))

    return forecast


class Guesses(Benchmark):
    """``base``: the values before the loop. ``previous``: the solution for an input with one percent of noise added.

    ``line``, ``parabola``: extrapolated along t. ``swept``: extrapolated over two sweeps, which are not counted.
    ``forecast``: a linear network that sees the last four inputs, fitted on the input with noise added. Only the sweeps
    are compared; where a solve had to be completed in order, so many steps stand beside them.
    """

    name = "guesses"
    summary = "sweeps by initial guess, rtol=1e-5"

    @torch.no_grad()
    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each problem and method."""
        for problem in problems(settings):
            earlier = trajectory(problem, problem.near)
            wanted = trajectory(problem)
            guesses = _guesses(problem, earlier)
            chunk = min(32, problem.loop.trip_count // 4)
            for method in (Jacobi(), Chunked(chunk), QuasiNewton(2), Picard()):
                if method.applies(problem.loop):
                    sweeps = {n: _sweeps(problem, method, guess, wanted) for n, guess in guesses.items()}
                    yield Row(problem.name, {"method": label(method), **sweeps})


def _guesses(problem: Problem, earlier: States) -> dict[str, Guess]:
    read: list[tuple[torch.Tensor, ...]] = []

    def remember(base: States, inputs: tuple[torch.Tensor, ...]) -> States:
        read.append(inputs)
        return base

    Given(remember).states(System(problem.loop, problem.near))
    return {
        "base": Base(),
        "previous": Previous(earlier),
        "line": Extrapolated(),
        "parabola": Extrapolated(order=2),
        "swept": Swept(),
        "forecast": Given(forecaster(earlier, read[0])),
    }


def _sweeps(problem: Problem, method: Method, guess: Guess, wanted: States) -> int | str:
    """Return the sweeps, with the completed steps where there are any; a wrong answer raises."""
    solved = solve_system(System(problem.loop, problem.operands), method, _CONTRACT, guess)
    # Each equation holds within the tolerance; along a stable recurrence the errors of many add up.
    error = float(compared(solved.states, wanted, _CONTRACT).units.max())
    assert error < 1e3, f"{method.name} from {guess}: {error:.3g} times the tolerance away from the ordinary run"
    if solved.solution.certificate is Certificate.FELL_BACK:
        return f"{solved.solution.sweeps} + {solved.solution.completed} in order"
    return solved.solution.sweeps
