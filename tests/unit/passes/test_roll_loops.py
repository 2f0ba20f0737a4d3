from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from torch import fx, nn

from fxjacobi.graph import TensorSpec, make_module, stamp
from fxjacobi.loops import Carried, Invariant, Kind, Literal, Scanned, Stacked, Step, Table
from fxjacobi.ops import guard
from fxjacobi.passes.eliminate import Eliminate
from fxjacobi.passes.roll_loops import RollLoops
from tests.unit.passes.programs import Program, assert_runs_as, front, loops, programs, record, roll, shape, targets

aten = torch.ops.aten
R = torch.randn


@settings(max_examples=150, deadline=None)
@given(programs())
def test_rolled_programs_give_the_bits_of_the_original_on_other_inputs(program: Program) -> None:
    module = record(program, *program.arguments())
    rolled = roll(module)
    note(str(rolled.graph))
    assert_runs_as(rolled, program, *program.arguments(1))


@settings(max_examples=150, deadline=None)
@given(programs())
def test_so_do_programs_after_all_front_passes(program: Program) -> None:
    module = record(program, *program.arguments())
    rolled = front(module)
    note(str(rolled.graph))
    assert_runs_as(rolled, program, *program.arguments(1))


def test_a_recurrence() -> None:
    def rnn(x: Any, h: Any, w: Any) -> Any:
        out = []
        for t in range(20):
            h = torch.tanh(h @ w + x[:, t])
            out.append(h)
        return torch.stack(out, 1), h

    rolled = roll(record(rnn, R(3, 20, 4), R(3, 4), R(4, 4)))
    assert_runs_as(rolled, rnn, R(3, 20, 4), R(3, 4), R(4, 4))
    (loop,) = loops(rolled)
    assert loop.trip_count == 20
    assert loop.kind is Kind.RECURRENCE
    assert set(loop.bindings) == {Carried(0, 1, (0,)), Invariant(1), Scanned(2, 1, range(20))}
    assert set(loop.results) == {Stacked(0), Step(0, 19)}
    assert [node.target for node in loop.body.graph.nodes if node.op == "call_function"] == [
        aten.mm.default,
        aten.add.Tensor,
        aten.tanh.default,
    ]


def test_the_recorded_module_is_left_as_it_is() -> None:
    def chain(x: Any) -> Any:
        for _ in range(6):
            x = torch.tanh(x * 2)
        return x

    module = record(chain, R(3))
    before = str(module.graph)
    result = RollLoops().run(module)
    assert result.modified
    assert str(module.graph) == before
    again = RollLoops().run(result.module)
    assert not again.modified
    assert again.module is result.module


def test_layers_are_steps_with_a_table_of_parameters() -> None:
    def layers(x: Any, *wb: Any) -> Any:
        for i in range(6):
            x = torch.relu(nn.functional.linear(x, wb[i], wb[6 + i]))
        return x

    args = [R(3, 4), *[R(4, 4) for _ in range(6)], *[R(4) for _ in range(6)]]
    rolled = roll(record(layers, *args))
    assert_runs_as(rolled, layers, *args)
    (loop,) = loops(rolled)
    assert sum(isinstance(binding, Table) and len(binding.operands) == 6 for binding in loop.bindings) == 2


def test_two_states_at_two_distances() -> None:
    def fibonacci(a: Any, b: Any) -> Any:
        out = []
        for _ in range(9):
            a, b = b, torch.sin(a) + b * 0.5
            out.append(b)
        return torch.stack(out), a

    rolled = roll(record(fibonacci, R(3), R(3)))
    assert_runs_as(rolled, fibonacci, R(3), R(3))
    (loop,) = loops(rolled)
    assert loop.kind is Kind.FIXED_POINT
    assert {(b.distance, len(b.init)) for b in loop.bindings if isinstance(b, Carried)} == {(1, 1), (2, 2)}


def test_iterations_that_differ_stay_outside() -> None:
    def odd(x: Any, w: Any) -> Any:
        h = torch.zeros(3)
        for t in range(20):
            h = torch.tanh(w @ h + x[t])
            if t in (2, 17):
                h = torch.exp(h)
        return h

    rolled = roll(record(odd, R(20, 3), R(3, 3)))
    assert_runs_as(rolled, odd, R(20, 3), R(3, 3))
    assert max(loop.trip_count for loop in loops(rolled)) in (14, 15)
    assert targets(rolled).count(aten.exp.default) == 2


def test_a_value_of_the_first_iteration_used_by_all_is_an_invariant() -> None:
    def first(x: Any, w: Any) -> Any:
        h = torch.zeros(3)
        kept = None
        for t in range(12):
            h = torch.tanh(w @ h + x[t])
            kept = h if kept is None else kept
            h = h + kept
        return h

    rolled = roll(record(first, R(12, 3), R(3, 3)))
    assert_runs_as(rolled, first, R(12, 3), R(3, 3))
    assert sum(loop.trip_count for loop in loops(rolled)) >= 11


def test_guards_roll_with_their_outcomes_as_literals() -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(3)
        for t in range(10):
            h = torch.tanh(h + x[t])
            if h.sum() > 100:
                h = h * 2
        return h

    rolled = roll(record(branches, R(10, 3)))
    assert_runs_as(rolled, branches, R(10, 3))
    (loop,) = loops(rolled)
    assert loop.trip_count == 10
    assert any(node.target is guard for node in loop.body.graph.nodes)


def test_random_draws_are_never_part_of_a_loop() -> None:
    def noisy(x: torch.Tensor) -> torch.Tensor:
        for _ in range(10):
            x = torch.tanh(x + torch.randn(3))
        return x

    module = record(noisy, R(3))
    assert RollLoops().run(module).module is module


def test_moving_data_is_no_loop() -> None:
    def views(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[i].unsqueeze(0).reshape(-1) for i in range(10)])

    module = record(views, R(10, 3))
    assert not RollLoops().run(module).modified


def test_many_single_uses_are_selected_from_the_stacked_result() -> None:
    def many(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = []
        for _ in range(10):
            x = torch.tanh(x * 2)
            out.append(x)
        return tuple(out[:7])

    rolled = roll(record(many, R(3)))
    assert_runs_as(rolled, many, R(3))
    (loop,) = loops(rolled)
    assert loop.results == (Stacked(0),)
    assert targets(rolled).count(aten.select.int) == 7


def spec(*shape: int) -> TensorSpec:
    return TensorSpec(shape, torch.float32, torch.device("cpu"), (1,) * len(shape))


def chain(count: int, factor: Any) -> fx.GraphModule:
    graph = fx.Graph()
    value = stamp(graph.placeholder("x"), spec(3))
    for t in range(count):
        value = stamp(graph.call_function(aten.mul.Tensor, (value, factor(t))), spec(3))
        value = stamp(graph.call_function(aten.tanh.default, (value,)), spec(3))
    graph.output((value,))
    return make_module({}, graph)


def test_literals_of_other_types_do_not_match() -> None:
    assert shape(roll(chain(10, lambda t: t))) == [10]
    assert shape(roll(chain(10, float))) == [10]
    assert shape(roll(chain(10, lambda t: (int, float)[t // 5](t)))) == [5, 5]


def test_signed_zeros_and_nan_stay_what_they_are() -> None:
    module = roll(chain(8, lambda t: [0.0, -0.0][t % 2]))
    (loop,) = loops(module)
    (values,) = [b.values for b in loop.bindings if isinstance(b, Literal)]
    assert [str(value) for value in values] == ["0.0", "-0.0"] * 4
    (loop,) = loops(roll(chain(8, lambda _: float("nan"))))
    assert not any(isinstance(binding, Literal) for binding in loop.bindings)


@pytest.mark.parametrize(("trips", "nodes", "rolled"), [(3, 8, False), (4, 8, True), (3, 6, True)])
def test_short_repeats_stay(trips: int, nodes: int, *, rolled: bool) -> None:
    assert RollLoops(minimum_nodes=nodes).run(chain(trips, lambda _: 2.0)).modified is rolled


def test_a_loop_without_results_is_kept_for_its_guards() -> None:
    graph = fx.Graph()
    value = stamp(graph.placeholder("x"), spec(3))
    for t in range(6):
        part = stamp(graph.call_function(aten.select.int, (value, 0, t % 3)), spec())
        positive = stamp(graph.call_function(aten.gt.Scalar, (part, t)), spec())
        stamp(graph.call_function(guard, (positive, False)), None)
    graph.output((value,))
    rolled = roll(make_module({}, graph))
    (loop,) = loops(rolled)
    assert loop.results == ()
    assert Eliminate().run(rolled).module is rolled


def test_a_result_of_several_outputs_is_not_carried_as_a_tuple() -> None:
    def sort(x: torch.Tensor) -> torch.Tensor:
        for _ in range(9):
            values, order = torch.sort(torch.sin(x))
            x = values + order
        return x

    rolled = roll(record(sort, R(5)))
    assert_runs_as(rolled, sort, R(5))
    (loop,) = loops(rolled)
    for node in loop.body.graph.nodes:
        assert not (node.op == "placeholder" and isinstance(node.meta["spec"], tuple))
    assert operator.getitem in targets(loop.body)
