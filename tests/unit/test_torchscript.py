"""Loops as TorchScript: the same bits, from any step on; what cannot be said is refused."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from torch import fx

from fxjacobi import ops
from fxjacobi.bits import equal_elements
from fxjacobi.errors import GuardFailed
from fxjacobi.graph import TensorSpec
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked, Step
from fxjacobi.passes.script_loops import ScriptLoops
from fxjacobi.scripted_loop import ScriptedLoop, run_in_order, scripted_steps
from fxjacobi.torchscript import NotScriptableError, script_graph, script_loop
from tests.unit.loop_makers import Program, graph_of, make_loop, node, programs, same_bits, trace

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten


@settings(max_examples=60, deadline=None)
@given(programs())
def test_random_loops_keep_their_bits(program: Program) -> None:
    loop, operands = program.loop, program.operands
    assert same_bits(script_loop(loop)(loop.align(operands)), loop(*operands))


@settings(max_examples=30, deadline=None)
@given(programs())
def test_resumes_from_any_step(program: Program) -> None:
    loop = program.loop
    if any(b.distance > loop.trip_count for b in loop.bindings if isinstance(b, Carried)):
        return
    operands = loop.align(program.operands)
    every = Loop(loop.body, loop.trip_count, loop.bindings, [Stacked(o) for o in range(len(_outputs(loop)))])
    whole, steps = every(*operands), script_loop(every)
    for start in {0, loop.trip_count // 2, loop.trip_count - 1}:
        before = [
            [
                whole[b.output][t] if t >= 0 else operands[b.init[t + b.distance]]
                for t in range(start - b.distance, start)
            ]
            for b in loop.bindings
            if isinstance(b, Carried)
        ]
        found = steps.resume(operands, start, before)
        assert same_bits(found, [value[start:] for value in whole])


def _outputs(loop: Loop) -> Any:
    return next(n for n in loop.body.graph.nodes if n.op == "output").args[0]


def recurrence(body: Callable[..., tuple[Any, ...]], steps: int = 8, **kinds: Any) -> tuple[Loop, list[torch.Tensor]]:
    """A loop over one state (4, 3), an input of the step, and a literal if there is one."""
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(4, 3, generator=generator), torch.randn(steps, 4, 3, generator=generator)]
    bindings: list[Any] = [Carried(0, 1, (0,)), Scanned(1, 0, range(steps))]
    if "literal" in kinds:
        bindings.append(Literal(tuple(kinds["literal"])))
    return make_loop(body, steps, bindings, [Stacked(0), Step(0, steps - 1)], operands), operands


@pytest.mark.parametrize(
    "body",
    [
        lambda h, x: (aten.where.self(aten.gt.Scalar(h, 0.5), x, aten.mul.Tensor(h, 2)),),
        lambda h, x: (aten.clamp.default(aten.sub.Tensor(h, x, alpha=2), -float("inf"), 3.0),),
        lambda h, x: (aten._to_copy.default(aten._to_copy.default(aten.add.Tensor(h, x), dtype=torch.float64), dtype=torch.float32),),
        lambda h, x: (aten.cat.default([aten.slice.Tensor(h, 1, 1, 9223372036854775807), aten.slice.Tensor(x, 1, 0, 1)], 1),),
        lambda h, x: (aten.add.Tensor(aten.sum.dim_IntList(h, [0], True), x),),
        lambda h, x: (aten.div.Tensor(aten.rsub.Scalar(h, 1.0), aten.add.Scalar(aten.abs.default(x), 1)),),
        lambda h, x: (node(ops.restride, aten.mul.Tensor(h, x), (1, 4)),),
        lambda h, x: (node(ops.write, h, aten.select.int(x, 1, 1), (None, 2)),),
        lambda h, x: (node(ops.write, x, aten.slice.Tensor(h, 0, 0, 2), ((0, 4, 2),)),),
    ],
    ids=["where", "infinity", "dtype", "cat", "reduce", "numbers", "restride", "write column", "write rows"],
)  # fmt: skip
def test_operations_keep_their_bits(body: Callable[..., tuple[Any, ...]]) -> None:
    loop, operands = recurrence(body)
    found = script_loop(loop)(operands)
    assert same_bits(found, loop(*operands))
    assert found[0].stride() == loop(*operands)[0].stride()


@pytest.mark.parametrize(
    "literal", [(0.5, -1.25, 3.0, 0.1, 0.0, 7.0, 1e-9, 2.0), (3, 1, 2, 9, 0, 4, 4, 4), (2.5,) * 8], ids=str
)
def test_numbers_of_the_step(literal: tuple[float, ...]) -> None:
    loop, operands = recurrence(lambda h, x, n: (aten.add.Tensor(aten.mul.Tensor(h, n), x),), literal=literal)
    assert same_bits(script_loop(loop)(operands), loop(*operands))


def test_carries_that_swap_are_read_before_they_are_overwritten() -> None:
    operands = [torch.zeros(2), torch.ones(2), torch.full((2,), 2.0)]
    bindings = [Carried(1, 1, (0,)), Carried(2, 1, (1,)), Carried(0, 2, (2, 0))]
    loop = make_loop(lambda a, b, c: (b, c, a), 7, bindings, [Stacked(0), Stacked(1), Stacked(2)], operands)
    assert same_bits(script_loop(loop)(operands), loop(*operands))


def test_a_loop_within_a_loop_is_one_call() -> None:
    inner, _ = recurrence(lambda h, x: (aten.tanh.default(aten.add.Tensor(h, x)),))
    graph = fx.Graph()
    h, x = graph.placeholder("h"), graph.placeholder("x")
    called = graph.call_module("inner", (h, x))
    last = graph.call_function(operator.getitem, (called, 1))
    graph.output((graph.call_function(aten.mul.Tensor, (last, 0.5)),))
    operands = [torch.randn(4, 3), torch.randn(8, 4, 3)]
    outer = make_loop(
        fx.GraphModule({"inner": inner}, graph), 5, [Carried(0, 1, (0,)), Invariant(1)], [Stacked(0)], operands
    )
    assert same_bits(script_loop(outer)(operands), outer(*operands))
    scripted = ScriptLoops().run(graph_of(outer, operands)).module
    (block,) = (m for m in scripted.children() if isinstance(m, ScriptedLoop))
    assert any(isinstance(m, ScriptedLoop) for m in block.loop.body.children()), "innermost first"
    assert same_bits(block(*operands), outer(*operands))


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (lambda h, x: (aten.bernoulli.default(aten.sigmoid.default(aten.add.Tensor(h, x))),), "draws"),
        (lambda h, x: (aten.add_.Tensor(aten.clone.default(h), x),), "writes"),
        (lambda h, x: (node(_mystery, h, x),), "_mystery has no TorchScript form"),
        (lambda h, x: (aten.add.Tensor(h, x), 3), "no tensor"),
        (lambda h, x: (aten.mul.Tensor(h, True),), "makes an integer"),
        (lambda h, x: (aten.bitwise_xor.Scalar(aten.gt.Tensor(h, x), False),), "makes an integer"),
    ],
    ids=["random", "in place", "unknown", "number", "bool", "bool as a scalar"],
)
def test_what_it_cannot_say_is_refused(body: Callable[..., tuple[Any, ...]], match: str) -> None:
    loop, _ = recurrence(body)
    loop = Loop(loop.body, loop.trip_count, loop.bindings, [Stacked(len(_outputs(loop)) - 1)])
    with pytest.raises(NotScriptableError, match=match):
        script_loop(loop)
    assert scripted_steps(loop) is None


def test_what_is_refused_runs_in_python() -> None:
    loop, operands = recurrence(lambda h, x: (node(_mystery, h, x),))
    assert same_bits(run_in_order(loop, operands), loop(*operands))


def _mystery(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a + b


def test_an_overload_that_resolves_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxjacobi import script_writer

    monkeypatch.setattr(script_writer, "TENSOR_TO_SCALAR", {})
    loop, _ = recurrence(lambda h, x: (aten.add.Tensor(aten.mul.Tensor(h, 2), x),))
    with pytest.raises(NotScriptableError, match="another overload"):
        script_loop(loop)


def test_a_graph_is_one_call() -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> tuple[Any, ...]:
        return aten.addmm.default(a, b, b), aten.topk.default(a, 2)[1]

    graph = trace(function)
    for placeholder in graph.graph.nodes:
        if placeholder.op == "placeholder":
            placeholder.meta["spec"] = TensorSpec((3, 3), torch.float32, torch.device("cpu"), (3, 1))
    a, b = torch.randn(3, 3), torch.randn(3, 3)
    found = script_graph(graph)(a, b)
    assert all(bool(equal_elements(f, w).all()) for f, w in zip(found, graph(a, b), strict=True))


def test_gradients_flow_through_the_steps() -> None:
    loop, operands = recurrence(lambda h, x: (aten.tanh.default(aten.mul.Tensor(aten.add.Tensor(h, x), 1.5)),))
    gradients = []
    for run in (ScriptedLoop(loop), loop):
        given = [o.clone().requires_grad_() for o in operands]
        run(*given)[0].square().sum().backward()
        gradients.append([g.grad for g in given])
    assert same_bits(*gradients)


def test_short_loops_stay() -> None:
    short, operands = recurrence(lambda h, x: (aten.add.Tensor(h, x),), steps=3)
    assert not ScriptLoops().run(graph_of(short, operands)).modified


def watched(h: Any, x: Any) -> tuple[Any, ...]:
    node(ops.guard, aten.any.default(aten.gt.Scalar(x, 100.0)), False)
    return (aten.add.Tensor(h, x),)


def watched_by_step(h: Any, x: Any, n: Any) -> tuple[Any, ...]:
    node(ops.guard, aten.sum.default(aten.gt.Scalar(x, 100.0)), n)
    return (aten.add.Tensor(h, x),)


@pytest.mark.parametrize("literal", [None, (0,) * 8, (0, 0, 0, 1, 0, 0, 2, 0)], ids=str)
@pytest.mark.parametrize("wrong", [0, 3, 7])
def test_guards_are_checked_after_the_steps(literal: tuple[int, ...] | None, wrong: int) -> None:
    operands = [torch.zeros(4, 3), torch.zeros(8, 4, 3)]
    for step, count in enumerate(literal or ()):
        operands[1][step].view(-1)[:count] = 200.0
    bindings: list[Any] = [Carried(0, 1, (0,)), Scanned(1, 0, range(8))]
    bindings += [] if literal is None else [Literal(literal)]
    body = watched if literal is None else watched_by_step
    loop = make_loop(body, 8, bindings, [Stacked(0), Step(0, 7)], operands)
    steps = script_loop(loop)
    assert same_bits(steps(operands), loop(*operands))
    operands[1][wrong, 1, 1] = 101.0
    with pytest.raises(GuardFailed):
        steps(operands)
    later = steps.resume(operands, wrong + 1, [[operands[0]]]) if wrong < 6 else None
    assert later is None or later[0].shape[0] == 7 - wrong


def test_guards_of_an_inner_loop_are_checked_at_every_step_of_the_outer() -> None:
    inner, _ = recurrence(watched)
    graph = fx.Graph()
    h, x = graph.placeholder("h"), graph.placeholder("x")
    last = graph.call_function(operator.getitem, (graph.call_module("inner", (h, x)), 1))
    graph.output((last,))
    operands = [torch.zeros(4, 3), torch.zeros(5, 8, 4, 3)]
    outer = make_loop(
        fx.GraphModule({"inner": inner}, graph),
        5,
        [Carried(0, 1, (0,)), Scanned(1, 0, range(5))],
        [Step(0, 4)],
        operands,
    )
    steps = script_loop(outer)
    assert same_bits(steps(operands), outer(*operands))
    operands[1][4, 7, 0, 0] = 101.0
    with pytest.raises(GuardFailed):
        steps(operands)


def test_bools_of_the_step_serve_guards_alone() -> None:
    def expecting(h: Any, x: Any, n: Any) -> tuple[Any, ...]:
        node(ops.guard, aten.any.default(aten.gt.Scalar(x, 100.0)), n)
        return (aten.add.Tensor(h, x),)

    flags = (False, True, False, False, True, False, False, False)
    operands = [torch.zeros(4, 3), torch.zeros(8, 4, 3)]
    operands[1][1] = operands[1][4] = 101.0
    bindings = [Carried(0, 1, (0,)), Scanned(1, 0, range(8)), Literal(flags)]
    loop = make_loop(expecting, 8, bindings, [Stacked(0)], operands)
    assert same_bits(script_loop(loop)(operands), loop(*operands))
    multiplied = make_loop(
        lambda h, x, n: (aten.add.Tensor(aten.mul.Tensor(h, n), x),), 8, bindings, [Stacked(0)], operands
    )
    with pytest.raises(NotScriptableError, match="bool of the step"):
        script_loop(multiplied)


def test_a_guard_that_is_no_tensor_is_refused() -> None:
    def equal(h: Any, x: Any) -> tuple[Any, ...]:
        node(ops.guard, aten.equal.default(h, x), False)
        return (aten.add.Tensor(h, x),)

    loop, _ = recurrence(equal)
    with pytest.raises(NotScriptableError, match="no tensor"):
        script_loop(loop)
