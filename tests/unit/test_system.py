"""A loop seen as equations: stacked evaluation equals the body step by step, whatever way of batching is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fxjacobi.batched_body import BatchedBody, Strategy
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Scanned, Stacked, Table
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
    from collections.abc import Callable

MAKERS: list[Callable[..., Recurrence]] = [rnn, gru, lstm, affine_diagonal, affine_dense, autoregressive]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(("start", "stop"), [(0, 9), (0, 1), (1, 3), (2, 9), (8, 9)])
def test_evaluation_is_the_body_step_by_step(make: Callable[..., Recurrence], start: int, stop: int) -> None:
    recurrence = make(9, 2, 3, dtype=torch.float64)
    system = System(recurrence.loop, recurrence.operands)
    states = tuple(torch.randn_like(s.contiguous()) for s in system.base())
    system.evaluate(states, start, stop)
    system.evaluate(states, start, stop)  # may trace the body
    outputs = system.evaluate(states, start, stop)  # runs what was traced
    for step in range(start, stop):
        for found, wanted in zip(outputs, system.alone(states, step), strict=True):
            torch.testing.assert_close(found[step - start], wanted)


@pytest.mark.parametrize("make", MAKERS)
def test_the_solution_is_the_fixed_point(make: Callable[..., Recurrence]) -> None:
    recurrence = make(9, 2, 3, dtype=torch.float64)
    system = System(recurrence.loop, recurrence.operands)
    states, others = system.complete(system.base(), {}, 0)
    for state, value in zip(states, system.next_states(states), strict=True):
        torch.testing.assert_close(state, value)
    for found, wanted in zip(system.results(states, others), recurrence.reference(), strict=True):
        assert torch.equal(found, wanted)


def test_completing_keeps_the_prefix_and_runs_the_rest() -> None:
    recurrence = lstm(9, 2, 3)
    system = System(recurrence.loop, recurrence.operands)
    whole, others = system.complete(system.base(), {}, 0)
    spoilt = tuple(torch.cat([s[:4], torch.full_like(s[4:], 7.0)]) for s in whole)
    states, rest = system.complete(spoilt, others, 4)
    for found, wanted in zip((*states, *rest.values()), (*whole, *others.values()), strict=True):
        assert torch.equal(found, wanted)


def test_a_memory_limit_cuts_the_sweep() -> None:
    recurrence = gru(20, 2, 3, dtype=torch.float64)
    rows: list[int] = []
    body = BatchedBody.of(recurrence.loop)

    def batch(arguments: Any, count: int) -> tuple[Any, ...]:
        rows.append(count)
        return body(arguments, count)

    limited = System(recurrence.loop, recurrence.operands, batch=batch, memory_limit=5_000)
    free = System(recurrence.loop, recurrence.operands)
    torch.testing.assert_close(limited.next_states(limited.base())[0], free.next_states(free.base())[0])
    assert max(rows) == limited.rows_limit < 20
    assert sum(rows) == 20


def chosen(loop: Loop, operands: tuple[Any, ...]) -> Strategy:
    system = System(loop, operands)
    return system.body.layout(system.arguments(system.base(), 0, system.steps), system.steps).strategy


def test_ways_of_batching() -> None:
    assert chosen(gru(9, 2, 3).loop, gru(9, 2, 3).operands) is Strategy.FOLD
    assert chosen(gru(1, 2, 3).loop, gru(1, 2, 3).operands) is Strategy.SINGLE
    assert chosen(affine_dense(9, 2, 3).loop, affine_dense(9, 2, 3).operands) is Strategy.VMAP
    assert chosen(autoregressive(9, 2, 3).loop, autoregressive(9, 2, 3).operands) is Strategy.VMAP


def literal_loop(step: Callable[..., tuple[Any, ...]], values: tuple[Any, ...], start: torch.Tensor) -> Loop:
    body = traced_body(step, (start, values[0]))
    bindings: list[Binding] = [Carried(0, 1, (0,)), Literal(values)]
    return Loop(body, len(values), bindings, [Stacked(0)])


def test_a_literal_that_an_op_needs_as_a_number_goes_row_by_row() -> None:
    def step(s: Any, shift: Any) -> tuple[Any, ...]:
        return (torch.ops.aten.roll.default(s, [shift], [1]),)

    start = torch.arange(6.0).reshape(1, 6)
    loop = literal_loop(step, (1, 2, 3, 1), start)
    assert chosen(loop, (start,)) is Strategy.EACH
    system = System(loop, (start,))
    states, _ = system.complete(system.base(), {}, 0)
    assert torch.equal(system.next_states(states)[0], states[0])


def test_random_draws_and_guards_are_not_pure() -> None:
    def draw(s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (s + torch.randn_like(s),)

    body = traced_body(draw, (torch.zeros(2),))
    assert not BatchedBody.of(Loop(body, 3, [Carried(0, 1, (0,))], [Stacked(0)])).pure
    assert BatchedBody.of(rnn(3, 1, 2).loop).pure


def test_a_carry_that_changes_its_shape_is_not_uniform() -> None:
    def grow(s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (s.double(),)

    body = traced_body(grow, (torch.zeros(2),))
    assert not BatchedBody.of(Loop(body, 1, [Carried(0, 1, (0,))], [Stacked(0)])).uniform
    assert BatchedBody.of(rnn(3, 1, 2).loop).uniform


def test_tables_and_strided_and_backward_scans() -> None:
    def step(s: torch.Tensor, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, c: torch.Tensor) -> tuple[Any, ...]:
        return (torch.tanh(s @ w + x * c - y),)

    steps, generator = 4, torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    operands = (randn(2, 3), randn(2, 9, 3), randn(2, 3, 4), *(randn(3, 3) for _ in range(steps)), randn(3))
    body = traced_body(step, (operands[0], operands[1][:, 0], operands[2][:, :, 0], operands[3], operands[7]))
    bindings: list[Binding] = [
        Carried(0, 1, (0,)), Scanned(1, 1, range(1, 9, 2)), Scanned(2, -1, (-1, -2, -3, -4)), Table((3, 4, 5, 6)),
        Invariant(7),
    ]  # fmt: skip
    loop = Loop(body, steps, bindings, [Stacked(0)])
    system = System(loop, operands)
    states, _ = system.complete(system.base(), {}, 0)
    torch.testing.assert_close(system.next_states(states)[0], loop(*operands)[0])
