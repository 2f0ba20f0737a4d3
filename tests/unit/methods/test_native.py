"""The ordinary order in machine code: its answer, what it is certified by, and where it must not be believed."""

from __future__ import annotations

import builtins
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import fxjacobi
from fxjacobi import native
from fxjacobi.certificate import Certificate
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Scanned, Stacked, Step, Table
from fxjacobi.methods import Contract, Native
from fxjacobi.methods import native as native_method
from fxjacobi.methods.native import refusal, splits
from fxjacobi.native.emitter import NoMachineFormError
from fxjacobi.native.program import Program, prepared
from fxjacobi.solve import solve
from fxjacobi.solved_loop import SolvedLoop
from fxjacobi.system import System
from fxjacobi.testing.recurrences import Recurrence, gru, lstm, rnn, traced_body

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CONTRACT = Contract(rtol=1e-5)
aten = torch.ops.aten


def test_it_solves_what_the_loop_says() -> None:
    recurrence = lstm(200, 3, 16)
    found, solution = solve(recurrence.loop, recurrence.operands, Native(), CONTRACT)
    assert solution.certificate is Certificate.IN_MACHINE_CODE
    assert (solution.sweeps, solution.completed) == (1, 0)
    assert solution.residual is not None
    assert 0 < solution.residual < 1e-5
    for one, wanted in zip(found, recurrence.reference(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=0, atol=1e-5)


def _mixed(steps: int) -> Recurrence:
    """Two carries of one component, a bool one, a table of weights, a number of the step, and one that stays."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(4, 4, generator=generator) for _ in range(steps)]
    xs = torch.randn(2, steps, 4, generator=generator)
    starts = [torch.randn(2, 4, generator=generator) for _ in range(3)]

    def step(near: Any, far: Any, on: Any, x: Any, w: Any, t: Any, half: Any) -> tuple[torch.Tensor, ...]:
        total = aten.tanh.default(aten.add.Tensor(aten.mm.default(near, w), aten.mul.Scalar(x, half)))
        total = aten.sub.Tensor(total, aten.div.Scalar(far, t))
        chosen = aten.where.self(on, total, aten.mul.Scalar(total, 0.5))
        return aten.mul.Scalar(chosen, 0.3), aten.logical_xor.default(on, aten.gt.Scalar(total, 0.0))

    arguments = (starts[0], starts[1], starts[0] > 0, xs[:, 0], tables[0], 1.0, 0.5)
    bindings: list[Binding] = [
        Carried(0, 1, (0,)), Carried(0, 3, (1, 2, 0)), Carried(1, 1, (3,)), Scanned(4, 1, range(steps - 1, -1, -1)),
        Table(tuple(5 + t for t in range(steps))), Literal(tuple(1.0 + t for t in range(steps))), Literal((0.5,) * steps),
    ]  # fmt: skip
    loop = Loop(traced_body(step, arguments), steps, bindings, [Stacked(0), Stacked(1), Step(0, steps - 1)])
    return Recurrence(loop, (*starts, starts[0] > 0, xs, *tables))


@pytest.mark.parametrize("steps", [1, 2, 3, 40])
def test_every_kind_of_binding(steps: int) -> None:
    recurrence = _mixed(steps)
    system = System(recurrence.loop, recurrence.operands)
    assert refusal(system) is None
    found, solution = solve(recurrence.loop, recurrence.operands, Native(), Contract(rtol=1e-4))
    assert solution.certificate is Certificate.IN_MACHINE_CODE
    for one, wanted in zip(found, recurrence.reference(), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 8])
def test_a_chaotic_recurrence_is_completed_in_order(batch: int) -> None:
    """Two runs that round otherwise part ways there; each of their equations holds all the same."""
    recurrence = rnn(400, batch, 32, scale=3.0)
    system = System(recurrence.loop, recurrence.operands)
    program, tensors = prepared(system)
    wanted = recurrence.reference()[0]
    assert (program(system, tensors).states[0] - wanted).abs().max() > 0.1
    found, solution = solve(recurrence.loop, recurrence.operands, Native(), CONTRACT)
    assert solution.certificate is Certificate.FELL_BACK
    assert solution.residual is not None
    assert solution.residual < 1e-5
    assert solution.completed == 400
    assert torch.equal(found[0], wanted)


@pytest.mark.parametrize("size", [0.99, 1.0, 1.01])
def test_what_rounding_comes_to_is_measured(size: float) -> None:
    """``s_t = size s_{t-1} + x_t`` passes each rounding on for ever, or more and more of it."""
    steps = 2000
    x = 1.0 + torch.rand(steps, 4, generator=torch.Generator().manual_seed(0))
    body = traced_body(lambda s, x: (size * s + x,), (x[0], x[0]))
    loop = Loop(body, steps, [Carried(0, 1, (0,)), Scanned(1, 0, range(steps))], [Stacked(0)])
    system = System(loop, (torch.zeros(4), x))
    program, tensors = prepared(system)
    run = program(system, tensors)
    states = [torch.zeros(4, dtype=torch.float64)]
    for t in range(steps):
        states.append(size * states[-1] + x[t].double())
    error = (run.states[0].double() - torch.stack(states[1:])).abs().amax(1)
    estimate = run.far[:, 0].double() / 256
    late = slice(steps // 2, None)
    assert bool((error[late] < 8 * estimate[late]).all())
    assert float(estimate[-1]) < 300 * float(error[late].max()), "it is no use if it is always large"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_what_is_not_finite_runs_in_the_ordinary_order(value: float) -> None:
    recurrence = rnn(60, 2, 8)
    start, x, w = recurrence.operands
    x = x.clone()
    x[30, 1, 2] = value
    body = traced_body(lambda h, x, w: (torch.mm(h, w) + x * x,), (start, x[0], w))
    loop = Loop(body, 60, recurrence.loop.bindings, recurrence.loop.results)
    found, solution = solve(loop, (start, x, w), Native(), CONTRACT)
    wanted = loop(start, x, w)
    assert torch.equal(torch.isfinite(found[0]), torch.isfinite(wanted[0]))
    assert solution.completed == 60
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


def test_wrong_machine_code_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a step that came out otherwise, at a call whose steps are all looked at, and at later ones."""
    recurrence = gru(64, 1, 8)
    whole = Program.__call__
    wrong: list[int] = []

    def planted(self: Program, *args: Any) -> Any:
        run = whole(self, *args)
        for step in wrong:
            run.states[0][step] += 0.01
        return run

    monkeypatch.setattr(Program, "__call__", planted)
    wrong[:] = [37]
    found, solution = solve(recurrence.loop, recurrence.operands, Native(), CONTRACT)
    assert (solution.certificate, solution.completed) == (Certificate.FELL_BACK, 64)
    wrong.clear()
    assert solve(recurrence.loop, recurrence.operands, Native(), CONTRACT)[1].certificate is Certificate.IN_MACHINE_CODE
    wrong[:] = [37]  # from now on one step in eight is looked at, others at each call
    ends = [solve(recurrence.loop, recurrence.operands, Native(), CONTRACT)[1].completed for _ in range(8)]
    assert sorted(ends) == [0] * 6 + [64] * 2  # as the step itself, and as what the next one reads
    wrong[:] = range(64)
    found, solution = solve(recurrence.loop, recurrence.operands, Native(), CONTRACT)
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda s: s.long(), "a state of torch.int64"),
        (lambda s: s.to(torch.complex64), "a state of torch.complex64"),
        (lambda s: s.bfloat16(), "a state of torch.bfloat16"),
    ],
)
def test_states_without_a_machine_form(make: Callable[[torch.Tensor], torch.Tensor], why: str) -> None:
    start = make(torch.ones(3))
    body = traced_body(lambda s: (s * 2,), (start,))
    loop = Loop(body, 5, [Carried(0, 1, (0,))], [Stacked(0)])
    assert refusal(System(loop, (start,))) == why
    assert not Native().applies(loop)


def test_an_operation_without_a_machine_form() -> None:
    start = torch.randn(5)
    body = traced_body(lambda s: (0.5 * torch.cumsum(s, 0),), (start,))
    loop = Loop(body, 40, [Carried(0, 1, (0,))], [Stacked(0)])
    why = refusal(System(loop, (start,)))
    assert why is not None
    assert "aten.cumsum.default has no machine form" in why

    def model(x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(5)
        for t in range(40):
            h = 0.5 * torch.cumsum(h, 0) + torch.sin(x[t] * h)
        return h

    xs = torch.randn(40, 5)

    for method in ("auto", "native"):
        compiled = fxjacobi.compile(model, rtol=1e-5, method=method, measure=False)
        compiled(xs)
        assert "aten.cumsum.default has no machine form" in str(compiled.plan)
        assert "native" not in {b.method for b in compiled.plan.blocks}


def test_a_fault_of_ours_costs_the_method_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(*_: Any) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("fxjacobi.native.program.written", fault)
    recurrence = gru(40, 1, 4)
    with caplog.at_level(logging.WARNING):
        assert refusal(System(recurrence.loop, recurrence.operands)) == "writing it raised ZeroDivisionError: planted"
    assert "not written as machine code" in caplog.text
    assert not Native().applies(recurrence.loop)


def test_without_llvm_the_plan_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: native.REMEDY)
    model, xs = _loop_model()
    compiled = fxjacobi.compile(model, rtol=1e-5, measure=False)
    compiled(xs)
    assert native.REMEDY in str(compiled.plan)
    assert "native" not in {b.method for b in compiled.plan.blocks}
    forced = fxjacobi.compile(model, rtol=1e-5, method="native", measure=False)
    forced(xs)
    assert native.REMEDY in " ".join(str(forced.plan).split())
    torch.testing.assert_close(forced(xs), model(xs), rtol=0, atol=1e-5)


def test_gradients_run_in_machine_code_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    whole = Program.__call__

    def counted(self: Program, system: System, *rest: Any) -> Any:
        ran.append(system.steps)
        return whole(self, system, *rest)

    monkeypatch.setattr(Program, "__call__", counted)
    recurrence = gru(50, 2, 8)
    operands = [o.clone().requires_grad_() for o in recurrence.operands]
    again = [o.clone().requires_grad_() for o in recurrence.operands]
    SolvedLoop(recurrence.loop, Native(), CONTRACT)(*operands)[0].square().sum().backward()
    recurrence.loop(*again)[0].square().sum().backward()
    assert ran == [50, 50]
    for one, other in zip(operands, again, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_cores_run_samples_of_their_own() -> None:
    recurrence = gru(100, 9, 16)
    system = System(recurrence.loop, recurrence.operands)
    assert splits(system)
    assert not splits(System(gru(100, 7, 16).loop, gru(100, 7, 16).operands))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found, solution = solve(recurrence.loop, recurrence.operands, Native(lanes=2), CONTRACT)
    finally:
        torch.set_num_threads(threads)
    assert solution.certificate is Certificate.IN_MACHINE_CODE
    torch.testing.assert_close(found[0], recurrence.reference()[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at least 1 core"):
        Native(lanes=0)


def test_layouts_of_operands_each_have_their_program() -> None:
    recurrence = gru(30, 2, 8)
    start, x, w, b = recurrence.operands
    wanted = recurrence.reference()[0]
    for weights in (w, w.t().contiguous().t(), torch.cat([w, w], 1)[:, :8]):
        for xs in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat_interleave(2, 2)[..., ::2]):
            found, solution = solve(recurrence.loop, (start, xs, weights, b), Native(), CONTRACT)
            assert solution.certificate is Certificate.IN_MACHINE_CODE
            torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-5)


def test_refused_layouts_run_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    recurrence = gru(30, 2, 8)

    def refuse(*_: Any) -> None:
        raise NoMachineFormError("planted")

    monkeypatch.setattr("fxjacobi.native.program.written", refuse)
    monkeypatch.setattr(native_method, "_refusals", {})
    found, solution = solve(recurrence.loop, recurrence.operands, Native(), CONTRACT)
    assert solution.completed == 30
    assert torch.equal(found[0], recurrence.reference()[0])


def test_an_invariant_that_is_a_bool_or_a_view() -> None:
    mask = torch.tensor([True, False, True, True])
    x = torch.randn(50, 3, 4)
    w = torch.randn(8, 8)[::2, 1::2]
    bindings: list[Binding] = [Carried(0, 1, (0,)), Scanned(1, 0, range(50)), Invariant(2), Invariant(3)]

    def step(s: torch.Tensor, x: torch.Tensor, m: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.where(m, torch.tanh(torch.mm(s, w) + x), 0.9 * s),)

    operands = (torch.zeros(3, 4), x, mask, 0.2 * w)
    loop = Loop(traced_body(step, (operands[0], x[0], mask, w)), 50, bindings, [Stacked(0)])
    found, solution = solve(loop, operands, Native(), CONTRACT)
    assert solution.certificate is Certificate.IN_MACHINE_CODE
    torch.testing.assert_close(found[0], loop(*operands)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "runs"),
    [
        (lambda h, x, t: torch.clamp_min(0.5 * h + x, 0.01 * t), True),
        (lambda h, x, t: torch.pow((0.5 * h + x).abs() + 0.1, 0.5 + t / 64), True),
        (lambda h, x, t: torch.where(h > t / 64, 0.5 * h, 0.5 * h + x) / (1 + t), True),
        (lambda h, x, t: torch.addcmul(0.5 * h, x, x, value=0.1 * t), False),
        (lambda h, x, t: nn.functional.leaky_relu(0.5 * h + x, 0.01 * t), False),
    ],
)
def test_numbers_that_differ_from_step_to_step(
    function: Callable[..., torch.Tensor], *, runs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def model(xs: torch.Tensor) -> torch.Tensor:
        h, rows = torch.zeros(3), []
        for t in range(40):
            h = function(h, xs[t], t)
            rows.append(h)
        return torch.stack(rows)

    xs = torch.rand(40, 3)
    compiled = fxjacobi.compile(model, rtol=1e-5, method="native", measure=False)
    compiled(xs)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(xs), model(xs), rtol=0, atol=1e-4)
    assert ("native" in {b.method for b in compiled.plan.blocks}) == runs, compiled.plan
    assert "not written as machine code" not in caplog.text


@pytest.mark.parametrize("unit", [1.0, 1e-40, 1e-60, 1e-300, 1e200])
def test_chaos_in_any_unit(unit: float) -> None:
    """What rounding comes to must not vanish, or overflow, in the numbers that it is kept in."""
    generator = torch.Generator().manual_seed(0)
    w = 6 * torch.randn(16, 16, generator=generator, dtype=torch.float64) / 4
    x = 0.1 * torch.randn(200, 1, 16, generator=generator, dtype=torch.float64)

    def step(h: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.tanh(torch.mm(h / unit, w) + x) * unit,)

    start = torch.zeros(1, 16, dtype=torch.float64)
    bindings: list[Binding] = [Carried(0, 1, (0,)), Scanned(1, 0, range(200)), Invariant(2)]
    loop = Loop(traced_body(step, (start, x[0], w)), 200, bindings, [Stacked(0)])
    found, solution = solve(loop, (start, x, w), Native(), Contract(rtol=1e-9))
    assert solution.completed == 200
    assert torch.equal(found[0], loop(start, x, w)[0])
    solution = solve(loop, (start, x, 0.05 * w), Native(), Contract(rtol=1e-9))[1]
    assert solution.certificate is Certificate.IN_MACHINE_CODE


def _loop_model() -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    cell = nn.GRUCell(4, 8).requires_grad_(False)

    def model(xs: torch.Tensor) -> torch.Tensor:
        h, rows = torch.zeros(1, 8), []
        for x in xs:
            h = cell(x, h)
            rows.append(h)
        return torch.stack(rows)

    return model, torch.randn(100, 1, 4)


def test_a_saved_plan_without_llvm_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, xs = _loop_model()
    compiled = fxjacobi.compile(model, rtol=1e-5, method="native", measure=False)
    compiled(xs)
    assert "native" in {b.method for b in compiled.plan.blocks}
    compiled.save_plan(tmp_path / "plan.json")
    loaded = fxjacobi.compile(model, rtol=1e-5, plan=tmp_path / "plan.json")
    loaded(xs)
    assert "native" in {b.method for b in loaded.plan.blocks}
    monkeypatch.setattr(native, "missing", lambda: native.REMEDY)
    without = fxjacobi.compile(model, rtol=1e-5, plan=tmp_path / "plan.json")
    without(xs)
    assert "native" not in {b.method for b in without.plan.blocks}
    text = " ".join(str(without.plan).split())
    assert "the saved plan names native" in text
    assert native.REMEDY in text


def test_an_llvm_that_does_not_load_costs_the_method_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, *rest: Any, **options: Any) -> Any:
        if name == "fxjacobi.native" and "program" in (rest[2] or ()):
            raise OSError("planted: no libLLVM")
        return importing(name, *rest, **options)

    importing = builtins.__import__
    native.missing.cache_clear()
    monkeypatch.setattr(builtins, "__import__", broken)
    try:
        why = native.missing()
    finally:
        monkeypatch.undo()
        native.missing.cache_clear()
    assert why is not None
    assert why.startswith(native.REMEDY)
    assert "OSError: planted" in why
    assert native.missing() is None
