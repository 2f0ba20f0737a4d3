from __future__ import annotations

import operator
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, note, settings
from torch import fx

from fxjacobi import ops
from fxjacobi.emit import is_view
from fxjacobi.equations import equations_of
from fxjacobi.errors import GuardFailed, PassError
from fxjacobi.graph import check, spec_of, stamp
from fxjacobi.loops import Carried, Invariant, Kind, Literal, Loop, Scanned, Stacked, Step
from fxjacobi.passes.split_components import SplitComponents, refusal
from tests.unit.loop_makers import Program, block_loops, graph_of, make_loop, node, programs, same_bits

aten = torch.ops.aten


def split(loop: Loop, *operands: torch.Tensor) -> fx.GraphModule:
    return SplitComponents().run(graph_of(loop, operands)).module


def kinds(module: fx.GraphModule) -> list[Kind]:
    return [loop.kind for loop in block_loops(module)]


@settings(max_examples=100, deadline=None)
@given(programs())
def test_outputs_are_those_of_the_unsplit_loop(program: Program) -> None:
    wanted = program.loop(*program.operands)
    module = SplitComponents().run(graph_of(program.loop, program.operands)).module
    note(module.code)
    assert same_bits(module(*program.operands), wanted)


@settings(max_examples=60, deadline=None)
@given(programs())
def test_each_node_is_in_one_block_and_each_recurrence_is_one_component(program: Program) -> None:
    module = split(program.loop, *program.operands)
    if refusal(program.loop):
        return
    whole = equations_of(program.loop)
    recurrences = [{n.name for n in c.nodes} for c in whole.recurrences]
    names = {n.name for n in program.loop.body.graph.nodes if n.op == "call_function" and not is_view(n)}
    seen: dict[str, int] = {}
    for i, loop in enumerate(block_loops(module)):
        equations = equations_of(loop)
        for component in equations.recurrences:
            # Placeholders that pass through stand for values laid out unlike their initial ones.
            if any(n.op != "placeholder" for n in component.nodes):
                assert {n.name for n in component.nodes} in recurrences
        assert sum(any(n.op != "placeholder" for n in c.nodes) for c in equations.recurrences) <= 1
        for n in loop.body.graph.nodes:
            view = n.target is operator.getitem and is_view(n.all_input_nodes[0])
            if n.op == "call_function" and n.name in names and not view:
                assert seen.setdefault(n.name, i) == i


def test_maps_before_and_after_a_recurrence() -> None:
    xs, w, h0 = torch.randn(6, 2, 4), torch.randn(4, 4), torch.zeros(2, 4)

    def body(x: Any, h: Any, w: Any) -> Any:
        p = aten.tanh.default(aten.mm.default(x, w))
        new = aten.sigmoid.default(aten.add.Tensor(p, h))
        return (new, aten.exp.default(new))

    loop = make_loop(
        body, 6, [Scanned(0, 0, range(6)), Carried(0, 1, (2,)), Invariant(1)], [Stacked(1), Step(0, 5)], [xs, w, h0]
    )
    module = split(loop, xs, w, h0)
    assert kinds(module) == [Kind.MAP, Kind.RECURRENCE, Kind.MAP]
    assert [
        sorted(str(n.target) for n in b.body.graph.nodes if n.op == "call_function") for b in block_loops(module)
    ] == [
        ["aten.mm.default", "aten.tanh.default"],
        ["aten.add.Tensor", "aten.sigmoid.default"],
        ["aten.exp.default"],
    ]
    assert same_bits(module(xs, w, h0), loop(xs, w, h0))


def test_invariants_move_out_and_the_last_head_becomes_straight_code() -> None:
    w, h0 = torch.randn(4, 4), torch.zeros(2, 4)

    def body(h: Any, w: Any) -> Any:
        new = aten.tanh.default(aten.mm.default(h, aten.t.default(w)))
        return (new, aten.exp.default(new))

    loop = make_loop(body, 5, [Carried(0, 1, (1,)), Invariant(0)], [Step(1, 4)], [w, h0])
    module = split(loop, w, h0)
    assert kinds(module) == [Kind.FIXED_POINT]
    straight = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert aten.t.default in straight
    assert aten.exp.default in straight
    (block,) = block_loops(module)
    assert block.results == (Step(0, 4),)
    assert same_bits(module(w, h0), loop(w, h0))


def test_a_head_needed_at_two_steps_is_a_map_of_two() -> None:
    h0 = torch.randn(2, 4)

    def body(h: Any) -> Any:
        new = aten.sin.default(h)
        return (new, aten.exp.default(new))

    loop = make_loop(body, 9, [Carried(0, 1, (0,))], [Step(1, 3), Step(1, 8)], [h0])
    module = split(loop, h0)
    assert [b.trip_count for b in block_loops(module)] == [9, 2]
    assert block_loops(module)[0].results == (Step(0, 3), Step(0, 8))
    assert same_bits(module(h0), loop(h0))


def test_two_independent_recurrences_are_two_blocks() -> None:
    a0, b0 = torch.randn(3), torch.randn(3)

    def body(a: Any, b: Any) -> Any:
        return (aten.sin.default(a), aten.cos.default(b))

    loop = make_loop(body, 4, [Carried(0, 1, (0,)), Carried(1, 1, (1,))], [Step(0, 3), Step(1, 3)], [a0, b0])
    assert kinds(split(loop, a0, b0)) == [Kind.FIXED_POINT, Kind.FIXED_POINT]


def test_a_delayed_value_of_another_block_is_shifted() -> None:
    xs, before = torch.randn(7, 3), torch.randn(3)

    def body(x: Any, previous: Any) -> Any:
        p = aten.exp.default(x)
        return (p, aten.sub.Tensor(p, previous))

    loop = make_loop(body, 7, [Scanned(0, 0, range(7)), Carried(0, 1, (1,))], [Stacked(1)], [xs, before])
    module = split(loop, xs, before)
    assert kinds(module) == [Kind.MAP, Kind.MAP]
    assert same_bits(module(xs, before), loop(xs, before))


def test_layouts_survive_the_stack() -> None:
    """A sum's rounding depends on its operand's strides."""
    xs = torch.randn(5, 33, 17)

    def body(x: Any, s: Any) -> Any:
        turned = aten.clone.default(aten.t.default(x))
        wide = aten.mul.Tensor(turned, 1.1)
        return (aten.add.Tensor(aten.sum.dim_IntList(wide, [0]), s),)

    operands = [xs, torch.zeros(33)]
    loop = make_loop(body, 5, [Scanned(0, 0, range(5)), Carried(0, 1, (1,))], [Stacked(0)], operands)
    assert same_bits(split(loop, *operands)(*operands), loop(*operands))


def test_unlike_layouts_of_a_delayed_value_are_kept_apart() -> None:
    xs, before = torch.randn(4, 3, 5), torch.randn(5, 3).t()

    def body(x: Any, previous: Any) -> Any:
        p = aten.exp.default(x)
        return (p, aten.sub.Tensor(p, previous))

    loop = make_loop(body, 4, [Scanned(0, 0, range(4)), Carried(0, 1, (1,))], [Stacked(1)], [xs, before])
    module = split(loop, xs, before)
    second = block_loops(module)[1]
    assert any(isinstance(b, Carried) for b in second.bindings)
    assert same_bits(module(xs, before), loop(xs, before))


def test_a_light_view_is_recomputed_and_a_heavy_one_kept() -> None:
    h0, big = torch.randn(2, 8), torch.randn(64, 3)

    def body(h: Any, x: Any) -> Any:
        gates = aten.sin.default(h)
        halves = aten.split.Tensor(gates, 4, 1)
        new = aten.cos.default(x)
        row = aten.select.int(new, 0, 5)
        return (gates, aten.exp.default(operator.getitem(halves, 1)), new, aten.exp.default(row))

    loop = make_loop(body, 6, [Carried(0, 1, (0,)), Carried(2, 1, (1,))], [Stacked(1), Stacked(3)], [h0, big])
    module = split(loop, h0, big)
    blocks = block_loops(module)
    targets = [[n.target for n in b.body.graph.nodes if n.op == "call_function"] for b in blocks]
    assert aten.split.Tensor in targets[-1]
    assert any(aten.select.int in t and aten.cos.default in t for t in targets)
    assert same_bits(module(h0, big), loop(h0, big))


def test_a_value_too_large_to_stack_is_reduced_where_it_is_made() -> None:
    x0 = torch.randn(64, 64)

    def body(x: Any) -> Any:
        new = aten.sin.default(x)
        return (new, aten.sum.default(new))

    loop = make_loop(body, 5, [Carried(0, 1, (0,))], [Stacked(1)], [x0])
    roomy = block_loops(SplitComponents().run(graph_of(loop, [x0])).module)
    tight = block_loops(SplitComponents(stack_limit=1000).run(graph_of(loop, [x0])).module)
    assert len(roomy) == 2
    assert len(tight) == 1
    assert same_bits(SplitComponents(stack_limit=1000).run(graph_of(loop, [x0])).module(x0), loop(x0))


def test_guards_go_into_a_map_and_still_fail() -> None:
    xs = torch.tensor([1.0, 2.0, 3.0])

    def body(x: Any, h: Any, wanted: Any) -> Any:
        node(ops.guard, aten.gt.Scalar(x, 2.5), wanted)
        return (aten.add.Tensor(x, h),)

    operands = [xs, torch.zeros(())]
    bindings = [Scanned(0, 0, range(3)), Carried(0, 1, (1,)), Literal((False, False, True))]
    loop = make_loop(body, 3, bindings, [Step(0, 2)], operands)
    module = split(loop, *operands)
    assert kinds(module) == [Kind.MAP, Kind.RECURRENCE]
    assert same_bits(module(*operands), loop(*operands))
    with pytest.raises(GuardFailed):
        module(torch.tensor([1.0, 2.7, 3.0]), operands[1])


def test_inner_loops_are_split_first() -> None:
    xs, h0, v = torch.randn(3, 4), torch.zeros(4), torch.randn(5, 4)

    def step(y: Any, x: Any, v: Any) -> Any:
        return (aten.mul.Tensor(aten.sin.default(x), v), aten.add.Tensor(y, aten.cos.default(v)))

    inner = make_loop(
        step, 5, [Carried(1, 1, (0,)), Invariant(1), Scanned(2, 0, range(5))], [Step(1, 4), Stacked(0)], [h0, xs[0], v]
    )
    graph = fx.Graph()
    h, x, w = (stamp(graph.placeholder(name), None) for name in "hxw")
    call = graph.call_module("inner", (h, x, w))
    first, second = (graph.call_function(operator.getitem, (call, i)) for i in range(2))
    total = graph.call_function(aten.sum.dim_IntList, (second, [0]))
    graph.output((graph.call_function(aten.add.Tensor, (first, total)),))
    operands = [xs, h0, v]
    loop = make_loop(
        fx.GraphModule({"inner": inner}, graph),
        3,
        [Carried(0, 1, (1,)), Scanned(0, 0, range(3)), Invariant(2)],
        [Step(0, 2)],
        operands,
    )
    module = split(loop, *operands)
    blocks = block_loops(module)
    inner_blocks = [n for b in blocks for n in b.body.graph.nodes if n.op == "call_module"]
    assert len(inner_blocks) == 2
    assert kinds(module)[0] is Kind.MAP
    assert same_bits(module(*operands), loop(*operands))


def test_dead_results_are_dropped_and_tuples_may_not_leak() -> None:
    a0, b0 = torch.randn(3), torch.randn(3)

    def body(a: Any, b: Any) -> Any:
        return (aten.sin.default(a), aten.cos.default(b))

    loop = make_loop(body, 4, [Carried(0, 1, (0,)), Carried(1, 1, (1,))], [Step(0, 3), Step(1, 3)], [a0, b0])
    module = graph_of(loop, [a0, b0])
    output = module.graph.output_node()
    values: Any = output.args[0]
    output.args = ((values[0],),)
    module.graph.eliminate_dead_code()
    assert len(block_loops(SplitComponents().run(module).module)) == 1
    leaking = graph_of(loop, [a0, b0])
    call = next(n for n in leaking.graph.nodes if n.op == "call_module")
    with leaking.graph.inserting_after(call):
        stamp(leaking.graph.call_function(len, (call,)), None)
    with pytest.raises(PassError, match="reads the tuple"):
        SplitComponents().run(leaking)


def test_random_bodies_stay_whole() -> None:
    h0 = torch.randn(3)
    torch.manual_seed(0)
    loop = make_loop(
        lambda h: (aten.add.Tensor(h, aten.rand_like.default(h)),), 3, [Carried(0, 1, (0,))], [Step(0, 2)], [h0]
    )
    assert "random" in refusal(loop)
    (whole,) = block_loops(SplitComponents().run(graph_of(loop, [h0])).module)
    assert whole.body is loop.body
    assert "random" in whole.reason


def test_shapes_that_depend_on_data_stay_whole() -> None:
    operands = [torch.ones(3, 4)]

    def body(x: Any) -> Any:
        found = aten.nonzero.default(x)
        node(ops.guard_shape, found, (4, 1))
        return (found,)

    loop = make_loop(body, 3, [Scanned(0, 0, range(3))], [Stacked(0)], operands)
    module = split(loop, *operands)
    (whole,) = block_loops(module)
    assert "depends on data" in whole.reason
    with pytest.raises(GuardFailed):
        module(torch.zeros(3, 4))


def test_blocks_are_in_topological_order_and_stamped() -> None:
    xs, h0 = torch.randn(6, 2, 4), torch.zeros(2, 4)

    def body(x: Any, h: Any) -> Any:
        new = aten.add.Tensor(aten.exp.default(x), h)
        return (new, aten.sin.default(new))

    loop = make_loop(body, 6, [Scanned(0, 0, range(6)), Carried(0, 1, (1,))], [Stacked(1)], [xs, h0])
    module = split(loop, xs, h0)
    check(module, after="test")
    for block in block_loops(module):
        check(block.body, after="test")
    graph = nx.DiGraph((a, n) for n in module.graph.nodes for a in n.all_input_nodes)
    assert nx.is_directed_acyclic_graph(graph)
    assert all(spec_of(n) is not None for n in module.graph.nodes if n.op == "call_module")
