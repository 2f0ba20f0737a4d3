"""The error of each method's iterate after each sweep."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.bench.problems import Problem, label, problems, trajectory
from fxjacobi.methods.anderson import Anderson
from fxjacobi.methods.chunked import Chunked
from fxjacobi.methods.damped import Damped
from fxjacobi.methods.guess import Base
from fxjacobi.methods.jacobi import Jacobi
from fxjacobi.methods.method import Contract
from fxjacobi.methods.picard import Picard
from fxjacobi.methods.quasi_newton import QuasiNewton
from fxjacobi.methods.windowed import Windowed
from fxjacobi.system import System

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fxjacobi.methods.method import Method
    from fxjacobi.system import States

__all__ = ["SWEEPS", "Convergence", "errors_by_sweep"]

SWEEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""The sweeps whose error a row shows."""

_SETTLED = 4
_LOST = 1e3

# Small enough that no method stops before the last sweep that is shown, unless nothing changes any more.
_CONTRACT = Contract(rtol=1e-12)


def methods(steps: int) -> tuple[Method, ...]:
    """Return the methods that are compared; diagonals of Jacobians are estimated."""
    chunk = min(32, steps // 2)
    return (
        Jacobi(), Windowed(4 * chunk), Chunked(chunk), QuasiNewton(2), Damped(probes=2), Picard(), Anderson(),
    )  # fmt: skip


def errors_by_sweep(
    problem: Problem, method: Method, reference: States, sweeps: int, *, floor: float = 0.0
) -> list[float]:
    """Return ``max |s - reference| / max |reference|`` after each of the first ``sweeps`` sweeps from the base values.

    A method that is done, whose iterate is the answer, or that has been below ``floor`` or out of all bounds for some
    sweeps, keeps its last error.
    """
    system = System(problem.loop, problem.operands)
    iterate = method.init(system, Base().states(system), _CONTRACT)
    errors: list[float] = []
    for _ in range(sweeps):
        late = errors[-_SETTLED:]
        if len(late) == _SETTLED and (max(late) <= floor or min(late) >= _LOST):
            errors.append(errors[-1])
            continue
        if not method.done(iterate, _CONTRACT) and iterate.prefix < system.steps:
            iterate = method.step(system, iterate, _CONTRACT)
        errors.append(_distance(iterate.states, reference))
    return errors


def _distance(states: States, reference: States) -> float:
    worst = 0.0
    for value, wanted in zip(states, reference, strict=True):
        error = float((value.double() - wanted.double()).abs().max() / wanted.double().abs().max())
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


class Convergence(Benchmark):
    """Error against the ordinary run in float64, relative to the largest state; the first guess is the base values.

    A sweep evaluates each equation once, except for chunked, whose sweep is a whole run through every chunk, and for
    the Newton kinds, which evaluate their Jacobian as well. Windowed counts the sweeps of all its windows.
    """

    name = "convergence"
    summary = "largest error after so many sweeps, relative to the largest state; H=128 or 28x28 pixels"

    @torch.no_grad()
    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each problem and method."""
        last = 8 if settings.quick else SWEEPS[-1]
        for problem in problems(settings):
            reference = trajectory(problem, double=True)
            ordinary = _distance(trajectory(problem), reference)
            for method in methods(problem.loop.trip_count):
                if not method.applies(problem.loop):
                    continue
                errors = errors_by_sweep(problem, method, reference, last, floor=4 * ordinary)
                shown = {str(k): errors[k - 1] for k in SWEEPS if k <= last}
                yield Row(problem.name, {"method": label(method), **shown, "ordinary_error": ordinary})
