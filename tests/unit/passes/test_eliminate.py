from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from torch import fx

from fxjacobi.graph import TensorSpec, make_module, stamp
from fxjacobi.loops import Carried, Loop, Step
from fxjacobi.ops import guard
from fxjacobi.passes.eliminate import Eliminate
from tests.unit.passes.programs import Program, assert_runs_as, loops, programs, record, targets

aten = torch.ops.aten
R = torch.randn
VECTOR = TensorSpec((3,), torch.float32, torch.device("cpu"), (1,))


def graph_of(build: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = stamp(graph.placeholder("x"), VECTOR)

    def call(target: Any, *args: Any, spec: Any = VECTOR, **kwargs: Any) -> fx.Node:
        return stamp(graph.call_function(target, args, kwargs), spec)

    graph.output(build(call, x))
    return make_module({}, graph)


def run(build: Any) -> list[Any]:
    module = graph_of(build)
    result = Eliminate().run(module)
    assert result.modified is (result.module is not module)
    return targets(result.module)


@settings(max_examples=60, deadline=None)
@given(programs())
def test_programs_keep_their_bits(program: Program) -> None:
    result = Eliminate().run(record(program, *program.arguments()))
    assert_runs_as(result.module, program, *program.arguments(1))
    assert not Eliminate().run(result.module).modified


def test_dead_code_goes_and_repeated_code_is_computed_once() -> None:
    def build(call: Any, x: Any) -> Any:
        call(aten.exp.default, x)
        a, b = (
            call(aten.tanh.default, call(aten.mul.Tensor, x, 2)),
            call(aten.tanh.default, call(aten.mul.Tensor, x, 2)),
        )
        return (call(aten.add.Tensor, a, b),)

    assert run(build) == [aten.mul.Tensor, aten.tanh.default, aten.add.Tensor]


def test_literals_are_told_apart_by_type_and_bits() -> None:
    def build(call: Any, x: Any) -> Any:
        total = x
        for literal in (1, 1.0, True, 0.0, -0.0, float("nan"), float("nan"), 0.0):
            total = call(aten.add.Tensor, total, call(aten.mul.Tensor, x, literal))
        return (total,)

    assert run(build).count(aten.mul.Tensor) == 6


def test_keyword_and_list_arguments_count() -> None:
    def build(call: Any, x: Any) -> Any:
        parts = [
            call(aten.cat.default, [x, x]),
            call(aten.cat.default, [x, x]),
            call(aten.cat.default, [x, x], 0),
            call(aten._to_copy.default, x, dtype=torch.float64),
            call(aten._to_copy.default, x, dtype=torch.float32),
        ]
        return (call(aten.cat.default, parts),)

    assert run(build).count(aten.cat.default) == 3
    assert run(build).count(aten._to_copy.default) == 2


def test_what_many_steps_compute_of_inputs_alone_moves_to_the_front() -> None:
    def build(call: Any, x: Any) -> Any:
        h = call(aten.exp.default, x)
        for _ in range(3):
            h = call(aten.mul.Tensor, h, call(aten.sin.default, call(aten.neg.default, x)))
        return (h,)

    assert run(build) == [aten.neg.default, aten.sin.default, aten.exp.default, *[aten.mul.Tensor] * 3]


def test_the_last_iteration_keeps_what_the_others_need() -> None:
    def states(x: torch.Tensor) -> torch.Tensor:
        total = x
        for _ in range(6):
            total = total + x
            x = torch.tanh(x)
        return total

    module = record(states, R(3))
    assert targets(Eliminate().run(module).module).count(aten.tanh.default) == 6
    assert targets(Eliminate(keep_iterations=False).run(module).module).count(aten.tanh.default) == 5


def test_draws_and_guards_stay() -> None:
    def build(call: Any, x: Any) -> Any:
        call(aten.randn.default, [3])
        call(aten.randn.default, [3])
        for _ in range(2):
            call(guard, call(aten.all.default, call(aten.gt.Scalar, x, 0)), True, spec=None)
        return (x,)

    found = run(build)
    assert found.count(aten.randn.default) == found.count(guard) == 2
    assert found.count(aten.gt.Scalar) == found.count(aten.all.default) == 1


def test_two_results_stay_two() -> None:
    def zeros(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, c = torch.tanh(x), torch.tanh(x), torch.tanh(x)
        return a, b.reshape(3, 1), c * 2

    result = Eliminate().run(record(zeros, R(3))).module
    assert targets(result).count(aten.tanh.default) == 2
    a, b, _ = result(R(3))
    assert a.data_ptr() != b.data_ptr()


def test_two_results_stay_two_where_a_third_value_comes_before_them() -> None:
    def build(call: Any, x: Any) -> Any:
        inner, a, b = (call(aten.full.default, [3], 0) for _ in range(3))
        return call(aten.add.Tensor, x, inner), a, b

    _, a, b = Eliminate().run(graph_of(build)).module(R(3))
    assert a.data_ptr() != b.data_ptr()


def test_bodies_of_loops_are_rewritten_too() -> None:
    def build(call: Any, x: Any) -> Any:
        call(aten.exp.default, x)
        return (call(aten.add.Tensor, call(aten.sin.default, x), call(aten.sin.default, x)),)

    loop = Loop(graph_of(build), 5, [Carried(0, 1, (0,))], [Step(0, 4)])
    graph = fx.Graph()
    x = stamp(graph.placeholder("x"), VECTOR)
    call = stamp(graph.call_module("loop_0", (x,)), (VECTOR,))
    graph.output((stamp(graph.call_function(__import__("operator").getitem, (call, 0)), VECTOR),))
    module = make_module({"loop_0": loop}, graph)
    result = Eliminate().run(module).module
    assert targets(loops(result)[0].body) == [aten.sin.default, aten.add.Tensor]
    assert targets(loop.body)[0] is aten.exp.default
    value = R(3)
    assert torch.equal(module(value)[0], result(value)[0])
