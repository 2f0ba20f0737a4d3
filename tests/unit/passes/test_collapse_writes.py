from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxjacobi import ops
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked, Step, Table
from fxjacobi.passes.collapse_writes import CollapseWrites
from fxjacobi.passes.split_components import SplitComponents
from fxjacobi.written import write_steps
from tests.unit.loop_makers import Program, block_loops, graph_of, make_loop, node, programs, same_bits

aten = torch.ops.aten


def collapsed(loop: Loop, operands: list[torch.Tensor]) -> tuple[Any, bool]:
    module = SplitComponents().run(graph_of(loop, operands)).module
    result = CollapseWrites().run(module)
    assert same_bits(result.module(*operands), loop(*operands))
    return result.module, result.modified


def test_columns_written_one_by_one_are_written_at_once() -> None:
    operands = [torch.zeros(2, 6), torch.randn(6, 2)]

    def body(x: Any, v: Any, t: Any) -> Any:
        return (node(ops.write, x, aten.exp.default(v), (None, t)),)

    bindings = [Carried(0, 1, (0,)), Scanned(1, 0, range(6)), Literal(tuple(range(6)))]
    loop = make_loop(body, 6, bindings, [Step(0, 5)], operands)
    module, modified = collapsed(loop, operands)
    assert modified
    assert len(block_loops(module)) == 1
    assert "(None, range(0, 6, 1))" in module.code or "(None, range(0, 6))" in module.code


def test_raster_order() -> None:
    operands = [torch.full((2, 3, 4, 5), -1.0), torch.randn(20, 2, 3)]

    def body(x: Any, v: Any, i: Any, j: Any) -> Any:
        return (node(ops.write, x, v, (None, None, i, j)),)

    rows, columns = tuple(t // 5 for t in range(20)), tuple(t % 5 for t in range(20))
    bindings = [Carried(0, 1, (0,)), Scanned(1, 0, range(20)), Literal(rows), Literal(columns)]
    loop = make_loop(body, 20, bindings, [Step(0, 19), Step(0, 7)], operands)
    module, modified = collapsed(loop, operands)
    assert modified
    assert not block_loops(module)


def test_slices_tables_and_scatters() -> None:
    operands = [torch.zeros(4, 9), *torch.randn(3, 4, 3), torch.randn(9)]

    def body(x: Any, v: Any, start: Any, stop: Any) -> Any:
        return (aten.slice_scatter.default(x, v, 1, start, stop),)

    bindings = [Carried(0, 1, (0,)), Table((1, 2, 3)), Literal((0, 3, 6)), Literal((3, 6, 9))]
    loop = make_loop(body, 3, bindings, [Step(0, 2)], operands)
    assert collapsed(loop, operands)[1]

    def select(x: Any, v: Any, t: Any) -> Any:
        return (aten.select_scatter.default(x, v, 0, t),)

    bindings = [Carried(0, 1, (0,)), Invariant(4), Literal((3, 1, -1))]
    loop = make_loop(select, 3, bindings, [Step(0, 2)], operands)
    assert collapsed(loop, operands)[1]


def test_a_read_of_the_array_a_history_or_an_accumulation_keeps_the_loop() -> None:
    operands = [torch.zeros(2, 6), torch.randn(6, 2)]
    bindings = [Carried(0, 1, (0,)), Scanned(1, 0, range(6)), Literal(tuple(range(6)))]

    def reads(x: Any, v: Any, t: Any) -> Any:
        return (node(ops.write, x, aten.add.Tensor(v, aten.sum.dim_IntList(x, [1])), (None, t)),)

    def accumulates(x: Any, v: Any, t: Any) -> Any:
        return (node(ops.write, x, aten.add.Tensor(v, aten.select.int(x, 1, 0)), (None, t)),)

    def writes(x: Any, v: Any, t: Any) -> Any:
        return (node(ops.write, x, v, (None, t)),)

    for body, result in ((reads, Step(0, 5)), (accumulates, Step(0, 5)), (writes, Stacked(0))):
        module, modified = collapsed(make_loop(body, 6, bindings, [result], operands), operands)
        assert not modified
        assert len(block_loops(module)) >= 1


def test_two_writes_a_step() -> None:
    operands = [torch.zeros(8), torch.randn(4), torch.randn(4)]

    def body(x: Any, v: Any, w: Any, i: Any, j: Any) -> Any:
        first = node(ops.write, x, v, (i,))
        return (node(ops.write, first, w, (j,)),)

    def loop(second: tuple[int, ...]) -> Loop:
        bindings = [
            Carried(0, 1, (0,)),
            *(Scanned(k, 0, range(4)) for k in (1, 2)),
            Literal((0, 2, 4, 6)),
            Literal(second),
        ]
        return make_loop(body, 4, bindings, [Step(0, 3)], operands)

    assert collapsed(loop((1, 3, 5, 7)), operands)[1]
    # Writes that meet must stay in order.
    assert not collapsed(loop((2, 4, 6, 0)), operands)[1]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_write_steps_is_the_loop_of_writes(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    steps = data.draw(st.integers(1, 8))
    places: list[Any] = []
    part: list[int] = []
    for size in shape[: data.draw(st.integers(1, len(shape)))]:
        match data.draw(st.integers(0, 2)):
            case 0:
                places.append(None)
                part.append(size)
            case 1:
                index = st.integers(-size, size - 1)
                places.append(tuple(data.draw(st.lists(index, min_size=steps, max_size=steps))))
            case _:
                length = data.draw(st.integers(1, size))
                starts = data.draw(st.lists(st.integers(0, size - length), min_size=steps, max_size=steps))
                places.append(tuple((s, s + length, 1) for s in starts))
                part.append(length)
    part += shape[len(places) :]
    base, values = torch.randn(shape), torch.randn(steps, *part)
    wanted = base
    for t in range(steps):
        wanted = ops.write(wanted, values[t], tuple(None if p is None else p[t] for p in places))
    assert torch.equal(write_steps(base, values, tuple(places)), wanted)


def test_write_steps_checks_places_and_has_gradients() -> None:
    with pytest.raises(IndexError):
        write_steps(torch.zeros(3), torch.ones(1), ((3,),))
    base, values = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3), (4, 2)))
    assert torch.autograd.gradcheck(lambda b, v: write_steps(b, v, (None, (0, 2, 0, 1))), (base, values))


@settings(max_examples=40, deadline=None)
@given(programs())
def test_other_loops_are_left_alone(program: Program) -> None:
    module = graph_of(program.loop, program.operands)
    result = CollapseWrites().run(module)
    assert not result.modified
    assert result.module is module
