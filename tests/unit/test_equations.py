from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings

from fxjacobi import ops
from fxjacobi.distribution import distribute
from fxjacobi.equations import equations_of, is_effect
from fxjacobi.graph import spec_of_value
from fxjacobi.loops import Carried, Invariant, Scanned, Stacked, Step
from fxjacobi.passes.split_components import refusal
from tests.unit.loop_makers import Program, make_loop, node, programs

aten = torch.ops.aten


def test_components_distances_and_invariants() -> None:
    def body(x: Any, h: Any, older: Any, w: Any) -> Any:
        p = aten.mm.default(x, aten.t.default(w))
        a = aten.add.Tensor(p, h)
        b = aten.add.Tensor(a, older)
        return (b, aten.exp.default(b))

    operands = [torch.randn(4, 2, 3), torch.randn(2, 3), torch.randn(3, 3)]
    bindings = [Scanned(0, 0, range(4)), Carried(0, 1, (1,)), Carried(0, 2, (1, 1)), Invariant(2)]
    loop = make_loop(body, 4, bindings, [Stacked(1)], operands)
    equations = equations_of(loop)
    (recurrence,) = equations.recurrences
    assert [n.name for n in recurrence.nodes] == ["h", "older", "add_tensor", "add_tensor_1"]
    assert {n.name for n in equations.invariant} == {"w", "t_default"}
    distances = {(a.name, b.name): d for a, b, d in equations.graph.edges(data="distance") if d}
    assert distances == {("add_tensor_1", "h"): 1, ("add_tensor_1", "older"): 2}
    order = [c.nodes[-1].name for c in equations.components]
    assert order.index("mm_default") < order.index("add_tensor_1") < order.index("exp_default")


def test_a_placeholder_that_carries_itself_is_a_recurrence() -> None:
    h0 = torch.randn(3)
    loop = make_loop(lambda h: (h, aten.exp.default(h)), 3, [Carried(0, 1, (0,))], [Step(1, 2)], [h0])
    (recurrence,) = equations_of(loop).recurrences
    assert [n.name for n in recurrence.nodes] == ["h"]
    assert "change places" in refusal(loop)


def test_guards_and_random_draws_are_effects() -> None:
    def body(x: Any) -> Any:
        node(ops.guard, aten.any.default(x), False)
        return (aten.rand_like.default(x), aten.exp.default(x))

    loop = make_loop(body, 1, [Scanned(0, 0, range(1))], [Step(0, 0)], [torch.zeros(1, 3)])
    effects = {n.name for n in loop.body.graph.nodes if n.op != "output" and is_effect(n)}
    assert effects == {"guard", "rand_like_default"}


@settings(max_examples=100, deadline=None)
@given(programs())
def test_blocks_cover_live_nodes_once_and_their_order_is_topological(program: Program) -> None:
    if refusal(program.loop):
        return
    specs = tuple(spec_of_value(o) for o in program.operands)
    distribution = distribute(program.loop, specs, stack_limit=1 << 28)
    placed = [n for block in distribution.blocks for n in block.nodes]
    assert len(placed) == len(set(placed)) == len(distribution.home)
    for n, home in distribution.home.items():
        for used in n.all_input_nodes:
            if used in distribution.home:
                assert distribution.home[used] <= home
    for n in distribution.live:
        if n.op == "placeholder" or n in distribution.equations.invariant or n in distribution.home:
            continue
        # Needed at no step: all that reads it is a result of a step before its carry's first use.
        assert not is_effect(n)
        assert not any(user in distribution.home for user in n.users)
