from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings

from fxjacobi.fixed_point import FixedPoint
from fxjacobi.loops import Carried, Invariant, Kind, Scanned, Step
from fxjacobi.passes.split_components import SplitComponents
from fxjacobi.passes.stop_early import StopEarly
from tests.unit.loop_makers import Program, block_loops, graph_of, make_loop, programs, same_bits

aten = torch.ops.aten


@settings(max_examples=60, deadline=None)
@given(programs())
def test_outputs_are_those_of_the_unsplit_loop(program: Program) -> None:
    module = SplitComponents().run(graph_of(program.loop, program.operands)).module
    result = StopEarly().run(module)
    assert result.modified is any(b.kind is Kind.FIXED_POINT and b.trip_count > 1 for b in block_loops(module))
    assert same_bits(result.module(*program.operands), program.loop(*program.operands))


def test_fires_on_fixed_points_only_and_prints_as_a_call() -> None:
    operands = [torch.randn(9, 3), torch.randn(3)]

    def body(x: Any, h: Any, g: Any, w: Any) -> Any:
        return (aten.add.Tensor(x, h), aten.tanh.default(aten.mul.Tensor(g, w)))

    bindings = [Scanned(0, 0, range(9)), Carried(0, 1, (1,)), Carried(1, 1, (1,)), Invariant(1)]
    loop = make_loop(body, 9, bindings, [Step(0, 8), Step(1, 8)], operands)
    before = SplitComponents().run(graph_of(loop, operands)).module
    after = StopEarly().run(before).module
    blocks = [after.get_submodule(str(n.target)) for n in after.graph.nodes if n.op == "call_module"]
    assert sorted(type(b).__name__ for b in blocks) == ["FixedPoint", "Loop"]
    assert not any(isinstance(m, FixedPoint) for m in before.modules())
    assert "self.fixed_point_" in after.code
    assert same_bits(after(*operands), loop(*operands))
