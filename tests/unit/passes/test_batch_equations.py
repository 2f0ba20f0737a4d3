from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import given, settings
from torch import fx

from fxjacobi.batched import BatchedMap
from fxjacobi.blocks import loop_of, plan_of_block
from fxjacobi.exactness import Batching, choose_ways
from fxjacobi.graph import check, stamp
from fxjacobi.loops import Carried, Invariant, Kind, Loop, Scanned, Stacked, Step
from fxjacobi.passes import batch_equations
from fxjacobi.passes.batch_equations import BatchEquations
from fxjacobi.passes.collapse_writes import CollapseWrites
from fxjacobi.passes.split_components import SplitComponents
from fxjacobi.passes.stop_early import StopEarly
from tests.unit.loop_makers import Program, graph_of, make_loop, programs, same_bits

if TYPE_CHECKING:
    import pytest

aten = torch.ops.aten


def blocks(module: fx.GraphModule) -> list[torch.nn.Module]:
    return [module.get_submodule(str(n.target)) for n in module.graph.nodes if n.op == "call_module"]


@settings(max_examples=60, deadline=None)
@given(programs())
def test_the_middle_passes_together_keep_every_bit(program: Program) -> None:
    module = graph_of(program.loop, program.operands)
    for each in (SplitComponents(), CollapseWrites(), StopEarly(), BatchEquations()):
        module = each.run(module).module
    assert same_bits(module(*program.operands), program.loop(*program.operands))
    for block in blocks(module):
        assert not isinstance(block, Loop) or block.kind is not Kind.MAP or block.reason


def rnn(steps: int, rows: int) -> tuple[Loop, list[torch.Tensor]]:
    operands = [
        torch.randn(steps, rows, 8),
        torch.zeros(rows, 16),
        torch.randn(8, 16),
        torch.randn(16, 16) / 4,
        torch.randn(16),
    ]

    def body(x: Any, h: Any, w: Any, u: Any, b: Any) -> Any:
        new = aten.tanh.default(aten.add.Tensor(aten.addmm.default(b, x, w), aten.mm.default(h, u)))
        return (new, aten.sigmoid.default(new))

    bindings = [Scanned(0, 0, range(steps)), Carried(0, 1, (1,)), Invariant(2), Invariant(3), Invariant(4)]
    return make_loop(body, steps, bindings, [Stacked(1), Step(0, steps - 1)], operands), operands


def test_maps_of_a_recurrent_network_are_batched_and_the_recurrence_stays() -> None:
    loop, operands = rnn(40, 8)
    before = SplitComponents().run(graph_of(loop, operands)).module
    result = BatchEquations().run(before)
    assert result.modified
    assert [type(b) for b in blocks(result.module)] == [BatchedMap, Loop, BatchedMap]
    assert same_bits(result.module(*operands), loop(*operands))
    assert not any(isinstance(m, BatchedMap) for m in before.modules())
    for block in blocks(result.module):
        assert loop_of(block) is not None
        if isinstance(block, BatchedMap):
            assert plan_of_block("map", block, before.graph.output_node()).method == "batched"
            assert "step by step" in block.reason
            check(block.batched, after="test")
            assert all(n.op != "call_method" for n in block.batched.graph.nodes)
    assert "self.map_" in result.module.code


def test_a_map_that_gains_nothing_stays_and_says_why() -> None:
    big = torch.randn(2, 400_000)
    loop = make_loop(lambda x: (aten.add.Tensor(x, 1.0),), 2, [Scanned(0, 1, (7, 3))], [Stacked(0)], [big])
    # Two steps of next to nothing: whichever is faster is kept, and a loop that stays says why.
    (block,) = blocks(BatchEquations().run(graph_of(loop, [big])).module)
    assert isinstance(block, (Loop, BatchedMap))
    assert block.reason
    huge = torch.zeros(1).expand(4, 1 << 29)
    loop = Loop(loop.body, 4, [Scanned(0, 0, range(4))], [Stacked(0)])
    for n in loop.body.graph.nodes:
        if n.op != "output":
            stamp(n, spec_of_row(huge))
    graph = graph_of_specs(loop, huge)
    (block,) = blocks(BatchEquations().run(graph).module)
    assert isinstance(block, Loop)
    assert "MiB" in block.reason


def spec_of_row(huge: torch.Tensor) -> Any:
    from fxjacobi.graph import TensorSpec

    return TensorSpec((huge.shape[1],), huge.dtype, huge.device, (1,))


def graph_of_specs(loop: Loop, operand: torch.Tensor) -> fx.GraphModule:
    """A graph that is never run."""
    graph = fx.Graph()
    whole = stamp(graph.placeholder("operand"), spec_of_row(operand))
    call = stamp(graph.call_module("loop_0", (whole,)), (spec_of_row(operand),))
    graph.output((stamp(graph.call_function(operator.getitem, (call, 0)), spec_of_row(operand)),))
    return fx.GraphModule({"loop_0": loop}, graph)


def test_parameters_are_measured_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of zeros makes every way exact, which random weights would not."""
    found: list[Batching] = []

    def noted(*args: Any, **options: Any) -> Batching:
        found.append(choose_ways(*args, **options))
        return found[-1]

    monkeypatch.setattr(batch_equations, "choose_ways", noted)
    xs = torch.randn(32, 1, 16)
    loop = make_loop(
        lambda x, w: (aten.mm.default(x, w),), 32, [Scanned(0, 0, range(32)), Invariant(1)], [Stacked(0)],
        [xs, torch.zeros(16, 16)],
    )  # fmt: skip
    graph = graph_of(loop, [xs, torch.zeros(16, 16)])
    weight = next(n for n in graph.graph.nodes if n.name == "operand_1")
    graph.register_parameter("weight", torch.nn.Parameter(torch.zeros(16, 16)))
    with graph.graph.inserting_before(weight):
        attribute = stamp(graph.graph.get_attr("weight"), weight.meta["spec"])
    weight.replace_all_uses_with(attribute)
    graph.graph.erase_node(weight)
    graph.recompile()
    (block,) = blocks(BatchEquations().run(graph).module)
    assert isinstance(block, BatchedMap)
    (choice,) = found[0].choices
    assert all(trial.equal for trial in choice.trials), "with other weights a flattened product has other bits"


def test_a_tolerance_takes_the_fastest_way() -> None:
    xs, w = torch.randn(64, 1, 32), torch.randn(32, 32)
    loop = make_loop(
        lambda x, w: (aten.sigmoid.default(aten.mm.default(x, w)),), 64, [Scanned(0, 0, range(64)), Invariant(1)],
        [Stacked(0)], [xs, w],
    )  # fmt: skip
    (block,) = blocks(BatchEquations(exact=False).run(graph_of(loop, [xs, w])).module)
    assert isinstance(block, BatchedMap)
    assert torch.allclose(block(xs, w)[0], loop(xs, w)[0], atol=1e-5)


def test_a_recurrence_alone_is_left_alone() -> None:
    h = torch.randn(3)
    loop = make_loop(lambda x: (aten.exp.default(x),), 4, [Carried(0, 1, (0,))], [Step(0, 3)], [h])
    result = BatchEquations().run(graph_of(loop, [h]))
    assert not result.modified


def test_nested_maps_become_one_batch() -> None:
    operands = [torch.randn(6, 5, 4, 8)]
    inner = make_loop(lambda x: (aten.tanh.default(x),), 5, [Scanned(0, 0, range(5))], [Stacked(0)], [operands[0][0]])
    graph = fx.Graph()
    call = graph.call_module("inner", (graph.placeholder("x"),))
    graph.output((aten_mul(graph, graph.call_function(operator.getitem, (call, 0))),))
    loop = make_loop(fx.GraphModule({"inner": inner}, graph), 6, [Scanned(0, 0, range(6))], [Stacked(0)], operands)
    result = BatchEquations().run(graph_of(loop, operands)).module
    (block,) = blocks(result)
    assert isinstance(block, BatchedMap)
    assert not [n for n in block.batched.graph.nodes if n.op == "call_module"]
    assert same_bits(result(*operands), loop(*operands))


def aten_mul(graph: fx.Graph, value: fx.Node) -> fx.Node:
    return graph.call_function(aten.mul.Tensor, (value, 2.0))
