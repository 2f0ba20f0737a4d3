"""What the solver benchmarks run on: cells with equal twins, captured recurrences, forecasts, rivals."""

from __future__ import annotations

import pytest
import torch

from fxjacobi.bench import Settings
from fxjacobi.bench.captured import recurrence_of
from fxjacobi.bench.cells import KINDS, CellCase, average, in_float64, relative_error
from fxjacobi.bench.convergence import errors_by_sweep
from fxjacobi.bench.guesses import forecaster
from fxjacobi.bench.problems import Problem, label, trajectory
from fxjacobi.bench.rivals import Graphed, by_torch_compile, graphed, in_own_memory
from fxjacobi.methods.chunked import Chunked
from fxjacobi.methods.jacobi import Jacobi
from fxjacobi.methods.quasi_newton import QuasiNewton

SETTINGS = Settings(quick=True)
CPU = torch.device("cpu")


@pytest.mark.parametrize("weights", ["default", "rows", "pixels"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_fused_twin_computes_the_same(kind: str, weights: str) -> None:
    case = CellCase(kind, weights, 40, 2, 8)
    loop, x = case.loop(SETTINGS), case.inputs(SETTINGS)
    assert x.shape == (40, 2, {"default": 8, "rows": 28, "pixels": 1}[weights])
    assert not torch.equal(x, case.inputs(SETTINGS, 2))
    torch.testing.assert_close(case.fused(loop)(x)[0], loop(x), rtol=1e-4, atol=1e-5)
    assert 0 < relative_error(loop(x), in_float64(loop)(x.double())) < 1e-5


def test_the_captured_recurrence_is_the_models() -> None:
    x, decay = torch.randn(30, 2, 3), torch.rand(30, 2, 3)
    loop, (operands,) = recurrence_of(average, (x, decay))
    assert loop.trip_count in (29, 30)
    (states,) = trajectory(Problem("", loop, operands, operands))
    assert torch.equal(states[-1], average(x, decay)[-1])
    with pytest.raises(ValueError, match="no recurrence"):
        recurrence_of(torch.tanh, (x,))


def test_errors_fall_to_those_of_the_ordinary_run() -> None:
    case = CellCase("GRU", "default", 40, 1, 8)
    loop, (operands,) = recurrence_of(case.loop(SETTINGS), (case.inputs(SETTINGS),))
    problem = Problem("", loop, operands, near=())
    reference = trajectory(problem, double=True)
    for method in (Jacobi(), Chunked(20), QuasiNewton(2)):
        errors = errors_by_sweep(problem, method, reference, 45)
        assert errors[0] > 1e-3
        assert errors[-1] < 1e-6
    assert label(Chunked(20)) == "chunked, 20 steps"
    assert label(Jacobi()) == "Jacobi"


def test_a_forecast_is_better_than_nothing() -> None:
    case = CellCase("GRU", "default", 200, 1, 4)
    loop, (operands, other) = recurrence_of(
        case.loop(SETTINGS), (case.inputs(SETTINGS, 1),), (case.inputs(SETTINGS, 2),)
    )
    known = trajectory(Problem("", loop, operands, ()))
    wanted = trajectory(Problem("", loop, other, ()))
    inputs = [next(v for v in each if isinstance(v, torch.Tensor) and v.shape[0] == 200) for each in (operands, other)]
    found = forecaster(known, (inputs[0],))(tuple(torch.zeros_like(w) for w in wanted), (inputs[1],))
    assert float((found[0] - wanted[0]).square().mean()) < 0.3 * float(wanted[0].square().mean())


def test_rivals_on_the_cpu() -> None:
    x = torch.randn(3)
    compiled = by_torch_compile(torch.tanh, (x,), backend="eager")
    assert compiled.run is not None
    assert compiled.first_s > 0
    assert torch.equal(compiled.run(x), torch.tanh(x))
    run = Graphed(lambda y: y * 2, (x,), CPU)
    assert torch.equal(run(x + 1), (x + 1) * 2)

    def refuses(y: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such thing\nin detail")

    closed = graphed(refuses, (x,), CPU)
    assert closed.run is None
    assert closed.refusal == "not capturable: no such thing"
    kept = torch.zeros(2)
    assert in_own_memory(lambda: kept)() is not kept
    assert in_own_memory(lambda: (kept, kept))()[1] is not kept
