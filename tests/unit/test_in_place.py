"""Writes of a loop go into the array itself where nobody can tell, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fxjacobi import ops
from fxjacobi.in_place import in_place_writes
from fxjacobi.loops import Carried, Literal, Loop, Scanned, Stacked, Step
from fxjacobi.scripted_loop import ScriptedLoop, run_in_order
from fxjacobi.torchscript import script_loop
from tests.unit.loop_makers import make_loop, node, same_bits

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten
STEPS = 6


def row(array: Any, at: Any) -> Any:
    return aten.select.int(array, 0, at)


def writing(body: Callable[..., tuple[Any, ...]], *results: Any) -> tuple[Loop, list[torch.Tensor]]:
    """A loop that carries an array (6, 3), with a value of the step and the step's number."""
    operands = [torch.randn(STEPS, 3), torch.randn(STEPS, 3)]
    bindings = [Carried(0, 1, (0,)), Scanned(1, 0, range(STEPS)), Literal(tuple(range(STEPS)))]
    return make_loop(body, STEPS, bindings, results or [Step(0, STEPS - 1)], operands), operands


def write_row(array: Any, x: Any, t: Any) -> tuple[Any, ...]:
    return (node(ops.write, array, aten.mul.Tensor(row(array, t), x), (t,)),)


def read_after(array: Any, x: Any, t: Any) -> tuple[Any, ...]:
    new = node(ops.write, array, x, (t,))
    return (node(ops.write, new, aten.add.Tensor(row(new, t), row(array, t)), (t,)),)


def view_read_after(array: Any, x: Any, t: Any) -> tuple[Any, ...]:
    view = row(array, t)
    new = node(ops.write, array, x, (t,))
    return (node(ops.write, new, aten.add.Tensor(view, x), (0,)),)


def keep_a_view(array: Any, x: Any, t: Any) -> tuple[Any, ...]:
    new = node(ops.write, array, x, (t,))
    return new, row(new, 0)


def keep_the_old(array: Any, x: Any, t: Any) -> tuple[Any, ...]:
    return node(ops.write, array, x, (t,)), array


def keep_a_copy(array: Any, x: Any, t: Any) -> tuple[Any, ...]:
    new = node(ops.write, array, x, (t,))
    return new, aten.mul.Tensor(row(new, 0), 2)


def twice(array: Any, x: Any, t: Any) -> tuple[Any, ...]:
    new = node(ops.write, array, x, (t,))
    return (node(ops.write, new, row(new, t), (0,)),)


def onto_itself(array: Any, x: Any, t: Any) -> tuple[Any, ...]:
    return (node(ops.write, array, aten.slice.Tensor(array, 0, 0, 5), ((1, 6, 1),)),)


CASES: list[tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...], int]] = [
    (write_row, (), 1),
    (twice, (), 2),
    (onto_itself, (), 1),
    (keep_a_copy, (Step(0, STEPS - 1), Stacked(1)), 1),
    (write_row, (Stacked(0),), 0),
    (write_row, (Step(0, 2), Step(0, STEPS - 1)), 0),
    (read_after, (), 0),
    (view_read_after, (), 0),
    (keep_a_view, (Step(0, STEPS - 1), Stacked(1)), 0),
    (keep_the_old, (Step(0, STEPS - 1), Stacked(1)), 0),
]


@pytest.mark.parametrize(("body", "results", "count"), CASES)
def test_in_place_where_nobody_can_tell(
    body: Callable[..., tuple[Any, ...]], results: tuple[Any, ...], count: int
) -> None:
    loop, operands = writing(body, *results)
    assert sum(map(len, in_place_writes(loop).values())) == count
    before = [o.clone() for o in operands]
    assert same_bits(script_loop(loop, in_place=True)(operands), loop(*operands))
    assert same_bits(operands, before), "the operands are the caller's"


def test_no_copy_is_made_at_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, operands = writing(write_row)
    counts = []
    for in_place in (True, False):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            script_loop(loop, in_place=in_place)(operands)
        events = [e for e in profile.events() if e.name == "aten::clone"]
        counts.append(len(events))
    # One copy of the array before the loop, and one of each value, against one of the array at each step.
    assert counts[0] == STEPS + 1
    assert counts[1] == STEPS


def test_two_carries_of_one_output_are_not_one_array() -> None:
    operands = [torch.zeros(STEPS, 3), torch.ones(STEPS, 3), torch.randn(STEPS, 3)]
    bindings = [Carried(0, 1, (0,)), Carried(0, 1, (1,)), Scanned(2, 0, range(STEPS)), Literal(tuple(range(STEPS)))]

    def body(a: Any, b: Any, x: Any, t: Any) -> tuple[Any, ...]:
        return (node(ops.write, a, aten.add.Tensor(row(b, t), x), (t,)),)

    loop = make_loop(body, STEPS, bindings, [Step(0, STEPS - 1)], operands)
    assert not in_place_writes(loop)
    assert same_bits(script_loop(loop, in_place=True)(operands), loop(*operands))


def test_autograd_is_never_written_over() -> None:
    loop, operands = writing(write_row)
    gradients = []
    for run in (ScriptedLoop(loop), loop):
        given = [o.clone().requires_grad_() for o in operands]
        run(*given)[0].square().sum().backward()
        gradients.append([g.grad for g in given])
    assert same_bits(*gradients)


@st.composite
def bodies(draw: st.DrawFn) -> fx.GraphModule:
    """Random writes and reads of versions of an array, in any order, through views."""
    graph = fx.Graph()
    array, x, t = (graph.placeholder(name) for name in ("array", "x", "t"))
    versions, rows = [array], [x]
    for _ in range(draw(st.integers(1, 7))):
        version = draw(st.sampled_from(versions))
        index = draw(st.integers(0, STEPS - 1) | st.just(t))
        match draw(st.integers(0, 3)):
            case 0:
                rows.append(graph.call_function(aten.select.int, (version, 0, index)))
            case 1:
                pair = draw(st.sampled_from(rows)), draw(st.sampled_from(rows))
                rows.append(graph.call_function(aten.sub.Tensor, pair))
            case _:
                value = draw(st.sampled_from(rows))
                versions.append(graph.call_function(ops.write, (version, value, (index,))))
    outputs = [draw(st.sampled_from(versions)), draw(st.sampled_from(rows)), draw(st.sampled_from(versions))]
    graph.output(tuple(outputs))
    return fx.GraphModule({}, graph)


@settings(max_examples=150, deadline=None)
@given(bodies(), st.booleans(), st.booleans())
def test_random_writes_keep_their_bits(body: fx.GraphModule, stacked: bool, old: bool) -> None:
    operands = [torch.randn(STEPS, 3), torch.randn(STEPS, 3)]
    bindings = [Carried(0, 1, (0,)), Scanned(1, 0, range(STEPS)), Literal(tuple(range(STEPS)))]
    results: list[Any] = [Step(0, STEPS - 1), Stacked(1)]
    results += [Stacked(2)] if stacked else []
    results += [Step(2, 3)] if old else []
    loop = make_loop(body, STEPS, bindings, results, operands)
    assert same_bits(run_in_order(loop, operands), loop(*operands))
