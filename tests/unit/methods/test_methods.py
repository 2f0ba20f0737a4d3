"""What each method is good for, and what it keeps."""

from __future__ import annotations

import pytest
import torch

from fxjacobi.certificate import Certificate
from fxjacobi.loops import Loop
from fxjacobi.methods import (
    Affine,
    Anderson,
    Chunked,
    Contract,
    Damped,
    Jacobi,
    Method,
    Newton,
    Picard,
    QuasiNewton,
    Windowed,
    memory_length,
)
from fxjacobi.methods.comparison import compared
from fxjacobi.methods.damped import smooth
from fxjacobi.methods.jacobian import batch_size, diagonals, full, windows
from fxjacobi.methods.settle import errors_along, floors, leading, replace_non_finite
from fxjacobi.solve import solve
from fxjacobi.system import System
from fxjacobi.testing.recurrences import Recurrence, affine_dense, affine_diagonal, gru, lstm, rnn

TOLERANCE = Contract(rtol=1e-5)


def sweeps(recurrence: Recurrence, method: Method, contract: Contract = TOLERANCE) -> int:
    found, solution = solve(recurrence.loop, recurrence.operands, method, contract)
    assert solution.certificate in (Certificate.RESIDUAL, Certificate.SCANNED)
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=0, atol=3e-5)
    return solution.sweeps


def test_newton_needs_fewer_sweeps_than_quasi_newton_than_jacobi() -> None:
    recurrence = gru(150, 2, 6)
    newton, quasi, jacobi = (sweeps(recurrence, m) for m in (Newton(), QuasiNewton(), Jacobi()))
    assert newton < quasi < jacobi


def test_two_sweeps_of_chunks_longer_than_the_memory() -> None:
    recurrence = gru(200, 1, 8)
    system = System(recurrence.loop, recurrence.operands)
    length = memory_length(system, TOLERANCE, limit=150)
    assert length is not None
    assert sweeps(recurrence, Chunked(2 * length)) <= 3
    assert sweeps(recurrence, Chunked(max(2, length // 4))) > 3


def test_a_chaotic_cell_has_no_memory_length() -> None:
    recurrence = rnn(200, 1, 16, scale=4.0)
    assert memory_length(System(recurrence.loop, recurrence.operands), TOLERANCE, limit=100) is None


@pytest.mark.parametrize("steps", [33, 64, 65, 100])
def test_chunks_that_do_not_divide_the_steps(steps: int) -> None:
    recurrence = lstm(steps, 2, 4, dtype=torch.float64)
    found, _ = solve(recurrence.loop, recurrence.operands, Chunked(16), Contract(rtol=1e-12))
    for value, wanted in zip(found, recurrence.reference(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("recurrence", [affine_diagonal(64, 2, 4), affine_diagonal(64, 2, 4, distance=3),
                                        affine_dense(64, 2, 4)], ids=["diagonal", "distance 3", "dense"])  # fmt: skip
def test_affine_recurrences_take_one_sweep(recurrence: Recurrence) -> None:
    found, solution = solve(recurrence.loop, recurrence.operands, Affine(), TOLERANCE)
    assert solution.certificate is Certificate.SCANNED
    assert solution.sweeps == 1
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=1e-5, atol=1e-6)


def test_picard_is_for_small_increments() -> None:
    slow = affine_diagonal(100, 1, 3)
    operands = (*slow.operands[:2], slow.operands[2] * 1e-3)
    recurrence = Recurrence(slow.loop, operands)
    assert sweeps(recurrence, Picard()) < 12
    _, solution = solve(recurrence.loop, operands, Jacobi(), TOLERANCE)
    assert solution.sweeps > 12


def test_anderson_speeds_picard_like_chains_up() -> None:
    recurrence = affine_dense(60, 1, 4)
    assert sweeps(recurrence, Anderson(history=4)) <= sweeps(recurrence, Jacobi()) + 4


def test_windows_bound_the_rows_of_a_sweep() -> None:
    recurrence = gru(80, 1, 4)
    seen: list[int] = []
    system = System(recurrence.loop, recurrence.operands)
    body = system.body

    def batch(arguments: object, rows: int) -> tuple[object, ...]:
        seen.append(rows)
        return body(arguments, rows)  # type: ignore[arg-type]

    for window in (Windowed(10), Windowed(10, sliding=False)):
        seen.clear()
        solve(recurrence.loop, recurrence.operands, window, TOLERANCE, batch=batch)
        assert max(seen[:-1]) <= 10
        assert seen[-1] == 80, "the residual of all steps is checked at the end"


def test_smoothing_solves_the_damped_least_squares_problem() -> None:
    steps, damping = 9, 0.7
    a, b, y = (torch.randn(steps, 1, dtype=torch.float64) for _ in range(3))
    for distance in (1, 2, 12):
        factors = a.clone()
        factors[:distance] = 0
        process = torch.eye(steps, dtype=torch.float64)
        for t in range(distance, steps):
            process[t, t - distance] = -factors[t, 0]
        matrix = process.T @ process + damping * torch.eye(steps, dtype=torch.float64)
        wanted = torch.linalg.solve(matrix, process.T @ b + damping * y)
        torch.testing.assert_close(smooth(factors, b, y, damping, distance), wanted)


def test_jacobians() -> None:
    recurrence = lstm(5, 3, 2, dtype=torch.float64)
    system = System(recurrence.loop, recurrence.operands)
    assert batch_size(system) == 3
    states = tuple(torch.randn_like(s.contiguous()) for s in system.base())
    read = windows(system, states)
    jacobian = full(system, read, 3)
    assert jacobian.shape == (5, 3, 1, 4, 4)
    sample, step = 1, 3

    def alone(flat: torch.Tensor) -> torch.Tensor:
        h, c = read[0][step].clone(), read[1][step].clone()
        h[sample], c[sample] = flat[:2], flat[2:]
        outputs = recurrence.loop.body(h, c, recurrence.operands[2][step], recurrence.operands[3])
        return torch.cat([outputs[0][sample], outputs[1][sample]])

    point = torch.cat([read[0][step, sample], read[1][step, sample]])
    wanted = torch.func.jacrev(alone)(point)
    torch.testing.assert_close(jacobian[step, sample, 0], wanted)
    assert bool((jacobian[0] == 0).all()), "the first step reads what was before the loop"
    exact = diagonals(system, read, 3, 0)
    assert exact[0] is not None
    assert exact[1] is not None
    diagonal = torch.cat([exact[0][step, sample], exact[1][step, sample]])
    torch.testing.assert_close(diagonal, wanted.diagonal())


def test_samples_that_read_each_other_are_no_batch() -> None:
    recurrence = affine_dense(5, 3, 3)
    body = recurrence.loop.body
    assert batch_size(System(recurrence.loop, recurrence.operands)) == 3
    for node in body.graph.nodes:
        if node.target is torch.ops.aten.mm.default:
            node.args = (node.args[1], node.args[0])
    body.recompile()
    mixing = Loop(body, 5, recurrence.loop.bindings, recurrence.loop.results)
    assert batch_size(System(mixing, recurrence.operands)) == 1


def test_units() -> None:
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([[1.0, 0.0], [2.0, 1.0], [inf, 1.0], [nan, nan], [inf, 0.0], [0.0, 0.0]])
    b = torch.tensor([[1.0, 1e-3], [2.0, 1.0], [inf, 1.0], [nan, nan], [1.0, 0.0], [0.0, 0.0]])
    found = compared((a,), (b,), Contract(rtol=1e-3)).units
    torch.testing.assert_close(found, torch.tensor([1.0, 0, 0, 0, inf, 0]).double())
    assert compared((torch.tensor([1, 2]),), (torch.tensor([1, 3]),), TOLERANCE).units.tolist() == [0, inf]


def test_errors_to_come_follow_the_gains() -> None:
    updates, floor = torch.full((50,), 0.5).double(), torch.full((50,), 1e-3).double()
    unknown = torch.full((50,), float("inf")).double()
    assert errors_along(updates, torch.full((50,), 0.1).double(), floor, (1,)).after < 0.1
    assert errors_along(updates, torch.full((50,), 1.5).double(), floor, (1,)).after > 1e6
    assert errors_along(updates, unknown, floor, (1,)).after == float("inf")


def test_updates_within_rounding_add_up() -> None:
    """A drift of less than rounding a step is no rounding: without a gain to dampen it, it is passed on undiminished."""
    floor = torch.full((3000,), 0.1).double()
    drift, unknown = torch.full((3000,), 0.04).double(), torch.full((3000,), float("inf")).double()
    found = errors_along(drift, unknown, floor, (1,))
    assert (found.final, found.assumed) == (7, True)  # a quarter of the tolerance
    assert found.after == pytest.approx(2999 * 0.04)
    # Dampened it is rounding again; the steps that do not move at all hand on what they were given.
    found = errors_along(drift, torch.full_like(drift, 0.5), floor, (1,))
    assert (found.final, found.assumed) == (3000, False)
    assert found.after == pytest.approx(0.04)
    later = errors_along(torch.zeros(9).double(), torch.ones(9).double(), floor[:9], (1,), found.carried)
    assert later.after == pytest.approx(0.04)


def test_an_error_of_the_rounding_of_the_ordinary_run_will_do() -> None:
    """Where what is amplified is no more than the rounding of each step, more sweeps bring nothing nearer."""
    floor, growing = torch.full((300,), 0.1).double(), torch.full((300,), 1.05).double()
    once = torch.zeros(300).double()
    once[0] = 0.005
    assert errors_along(once, growing, floor, (1,)).final == 300
    assert errors_along(once * 10, growing, floor, (1,)).after > 1e4


def test_small_helpers() -> None:
    assert leading(torch.tensor([True, True, False, True])) == 2
    assert leading(torch.tensor([True])) == 1
    state = torch.tensor([[float("nan")], [float("inf")], [3.0]])
    assert replace_non_finite((state,), (torch.zeros(3, 1),), 1)[0][1:].tolist() == [[0.0], [3.0]]
    epsilon = torch.finfo(torch.float32).eps
    one = torch.ones(1, 1)
    assert floors((one,), Contract(rtol=1e-3)).item() == pytest.approx(8 * epsilon / 1e-3)
    assert floors((one,), Contract(rtol=epsilon / 2)).item() == pytest.approx(2)


@pytest.mark.parametrize(
    "make",
    [lambda: Windowed(0), lambda: Chunked(0), lambda: QuasiNewton(-1), lambda: Damped(0.0), lambda: Damped(1.0, -1),
     lambda: Anderson(0), lambda: Anderson(1, -1.0)],
)  # fmt: skip
def test_options_are_checked(make: object) -> None:
    with pytest.raises(ValueError, match=r"must be|holds"):
        make()  # type: ignore[operator]
