"""The memory of a solve: stated beforehand, kept under a limit, and shrunk where it does not fit."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fxjacobi
from fxjacobi.batched_body import BatchedBody
from fxjacobi.certificate import Certificate
from fxjacobi.footprint import StateSize, row_bytes, solve_bytes
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
    Windowed,
)
from fxjacobi.methods.chunks import Chunks, run_chunks
from fxjacobi.solve import solve
from fxjacobi.solved_loop import SolvedLoop
from fxjacobi.system import System
from fxjacobi.testing.recurrences import Recurrence, affine_dense, affine_diagonal, autoregressive, gru, lstm

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TOLERANCE = Contract(rtol=1e-4)
METHODS: list[Method] = [
    Jacobi(), Windowed(30), Chunked(10), Newton(), QuasiNewton(), Damped(), Picard(), Anderson(), Affine(),
    Native(),
]  # fmt: skip


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most bytes that ``function`` held at once, as the allocator counted them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        function()
    assert recorded.profiler is not None
    results: Any = recorded.profiler.kineto_results
    events = sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    now = most = 0
    for event in events:
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("limit", [None, 75_000])
@pytest.mark.parametrize(
    ("make", "method"),
    [(gru, Jacobi()), (gru, Chunked(20)), (gru, QuasiNewton()), (gru, Newton()), (lstm, Anderson()),
     (autoregressive, Picard()), (affine_dense, Affine()), (affine_diagonal, Affine()),
     (gru, Damped())],
    ids=lambda v: getattr(v, "__name__", repr(v)),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.11
def test_the_stated_memory_is_what_a_solve_holds(
    make: Callable[..., Recurrence], method: Method, limit: int | None
) -> None:
    # With few elements, so that fragments and headers do not count; Picard's increments want a slow chain.
    recurrence = make(100, 4, 6)
    operands, loop = recurrence.operands, recurrence.loop
    for _ in range(2):
        solve(loop, operands, method, TOLERANCE)  # ways are chosen and traced
    held = peak_bytes(lambda: solve(loop, operands, method, TOLERANCE, memory_limit=limit))
    stated = solve_bytes(loop, method, limit)
    assert stated / 3 <= held <= 1.25 * stated


def test_a_row_holds_what_lives_at_once_and_views_hold_nothing() -> None:
    recurrence = gru(9, 2, 4)
    row = row_bytes(recurrence.loop)
    inputs = (2 * 4 + 2 * 12) * 4  # h and x
    everything = sum(
        torch.Size(n.meta["spec"].shape).numel() * 4
        for n in recurrence.loop.body.graph.nodes
        if n.op == "call_function" and hasattr(n.meta["spec"], "shape")
    )
    assert inputs + 2 * 12 * 4 <= row < inputs + everything


def test_the_size_of_a_state() -> None:
    size = StateSize.of(lstm(9, 2, 4).loop)
    assert (size.bytes, size.elements, size.itemsize, size.batch, size.reach) == (2 * 2 * 4 * 4, 8, 4, 2, 1)
    assert StateSize.of(lstm(9, 2, 4).loop, 1).elements == 16
    assert StateSize.of(autoregressive(9, 2, 4).loop).reach == 3
    assert StateSize.of(autoregressive(2, 2, 4).loop).reach == 2


@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("limit", [1, 3_000])
def test_a_limit_shrinks_the_window_of_every_method(method: Method, limit: int) -> None:
    recurrence = affine_dense(32, 2, 4)
    found, solution = solve(recurrence.loop, recurrence.operands, method, TOLERANCE, memory_limit=limit)
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=1e-3, atol=1e-3)
    assert solution.window is not None
    assert solution.window < 32
    assert (solution.window == 1) == (limit == 1)


class Planted:
    """Fails as a full device does: from the ``first``-th evaluation on, whatever is larger than ``fits`` rows."""

    def __init__(self, first: int, fits: int) -> None:
        self.first, self.fits = first, fits
        self.calls = self.failures = self.largest = 0

    def into(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = BatchedBody.__call__

        def planted(body: BatchedBody, arguments: Sequence[Any], rows: int) -> tuple[Any, ...]:
            self.fail(rows)
            return whole(body, arguments, rows)

        monkeypatch.setattr(BatchedBody, "__call__", planted)

    def fail(self, rows: int) -> None:
        self.calls += 1
        if self.calls >= self.first:
            self.largest = max(self.largest, rows)
        if self.calls >= self.first and rows > self.fits:
            self.failures += 1
            raise torch.OutOfMemoryError("planted")


@pytest.mark.parametrize("method", [m for m in METHODS if not isinstance(m, Chunked)], ids=repr)
@pytest.mark.parametrize(("first", "fits"), [(1, 13), (1, 1), (2, 7), (4, 13)])
def test_running_out_of_memory_at_any_evaluation(
    method: Method, first: int, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recurrence = affine_dense(32, 2, 4)
    planted = Planted(first, fits)
    planted.into(monkeypatch)
    found, solution = solve(recurrence.loop, recurrence.operands, method, TOLERANCE)
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=1e-3, atol=1e-3)
    if planted.failures:
        assert solution.window is not None
        assert solution.window <= max(fits, 1)
    else:
        assert planted.largest <= fits
        assert solution.window is None


@pytest.mark.parametrize(
    ("method", "where"),
    [(Newton(), "newton.matrix_affine_scan"), (Affine(), "newton.matrix_affine_scan"),
     (QuasiNewton(), "linearised.affine_scan"), (Picard(), "linearised.affine_scan"), (Damped(), "damped.strided_scan"),
     (Anderson(), "anderson.flattened")],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("fits", [0, 1, 17])
def test_running_out_of_memory_in_what_a_method_does_beside_evaluating(
    method: Method, where: str, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scans and histories do not run range by range: the whole method goes on in windows, or at last in order."""
    recurrence = affine_dense(32, 2, 4)
    module, name = where.split(".")
    whole = getattr(sys.modules[f"fxjacobi.methods.{module}"], name)

    def full(*arguments: Any) -> Any:
        stack = next(a for value in arguments for a in (value if isinstance(value, tuple) else (value,))
                     if isinstance(a, torch.Tensor))  # fmt: skip
        if stack.shape[0] > fits:
            raise torch.OutOfMemoryError("planted")
        return whole(*arguments)

    monkeypatch.setattr(f"fxjacobi.methods.{where}", full)
    found, solution = solve(recurrence.loop, recurrence.operands, method, TOLERANCE)
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=1e-3, atol=1e-3)
    assert solution.window == (1 if fits <= 1 else 16)
    if fits == 0:
        assert solution.certificate is Certificate.FELL_BACK
        assert solution.completed == 32


@pytest.mark.parametrize("warm_up", [0, 4])
@pytest.mark.parametrize("fits", [0, 1, 3])
def test_running_out_of_memory_in_chunks(fits: int, warm_up: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recurrence = affine_dense(32, 2, 4)

    def full(system: System, chunks: Chunks) -> Any:
        if len(chunks.starts) > fits:
            raise torch.OutOfMemoryError("planted")
        return run_chunks(system, chunks)

    monkeypatch.setattr("fxjacobi.methods.chunked.run_chunks", full)
    found, solution = solve(recurrence.loop, recurrence.operands, Chunked(4, warm_up), TOLERANCE)
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=1e-3, atol=1e-3)
    assert solution.window is not None
    assert solution.window <= max(4 * fits, 1)
    assert (solution.completed == 32) == (fits == 0)


@pytest.mark.parametrize(("first", "fits"), [(1, 7), (1, 1), (3, 2)])
def test_running_out_of_memory_in_the_gradients(first: int, fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recurrence = gru(32, 2, 4, dtype=torch.float64)
    contract = Contract(rtol=1e-11, atol=1e-12)
    gradients: list[tuple[torch.Tensor, ...]] = []
    planted = Planted(first, fits)
    for module in (recurrence.loop, SolvedLoop(recurrence.loop, Jacobi(), contract)):
        leaves = [o.clone().requires_grad_() for o in recurrence.operands]
        result = module(*leaves)[0].square().sum()
        with monkeypatch.context() as patch:
            if module is not recurrence.loop:
                planted.into(patch)
            gradients.append(torch.autograd.grad(result, leaves))
    assert planted.failures > 0
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def test_windows_of_a_system_are_its_equations() -> None:
    recurrence = autoregressive(30, 2, 3, dtype=torch.float64)
    system = System(recurrence.loop, recurrence.operands)
    states, _ = system.complete(system.base(), {}, 0)
    for start, stop in ((0, 30), (0, 2), (1, 9), (2, 3), (29, 30)):
        part = system.between(start, stop, states)
        for found, wanted in zip(part.next_states(tuple(s[start:stop] for s in states)), states, strict=True):
            torch.testing.assert_close(found, wanted[start:stop])


def test_the_plan_states_the_memory_and_the_report_the_window() -> None:
    torch.manual_seed(0)
    cell = nn.GRUCell(3, 4)

    def run(xs: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(2, 4)
        rows = []
        for t in range(xs.shape[0]):
            h = cell(xs[t], h)
            rows.append(h)
        return torch.stack(rows)

    xs = torch.randn(80, 2, 3)
    with torch.no_grad():
        for limit in (None, 4_000):
            compiled = fxjacobi.compile(run, rtol=1e-4, method="jacobi", measure=False, memory_limit=limit)
            compiled(xs)
            torch.testing.assert_close(compiled(xs), run(xs), rtol=0, atol=1e-3)
            block = next(b for b in compiled.plan.blocks if b.method.startswith("jacobi"))
            assert block.memory_bytes is not None
            assert "KiB" in str(compiled.plan)
            report = next(b for b in compiled.report.blocks if b.name == block.name)
            assert (report.window is None) == (limit is None)
