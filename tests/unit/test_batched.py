from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fxjacobi.batched import BatchedMap, numbers, rows_apart, select_each, select_own, slice_each
from fxjacobi.errors import PassError
from fxjacobi.loops import Carried, Scanned, Stacked, Step
from tests.unit.loop_makers import make_loop

aten = torch.ops.aten

sizes = st.integers(1, 40)


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 30), rows=st.integers(1, 4), columns=sizes, seed=st.integers(0, 99))
def test_rows_apart_have_the_bits_of_single_steps(steps: int, rows: int, columns: int, seed: int) -> None:
    """Where rows end, a vectorised kernel changes to its scalar tail, which rounds otherwise."""
    x = torch.randn(steps, rows, columns, generator=torch.Generator().manual_seed(seed))
    for op in (aten.sigmoid.default, aten.silu.default, aten.tanh.default):
        wanted = torch.stack([op(row) for row in x])
        assert torch.equal(rows_apart(op, (rows, columns), x), wanted)


def test_the_plain_batch_has_other_bits() -> None:
    """The reason for all of this; a change here means that torch's kernels have changed."""
    x = torch.randn(200, 13)
    wanted = torch.stack([aten.sigmoid.default(row) for row in x])
    assert not torch.equal(aten.sigmoid.default(x), wanted)
    assert torch.equal(rows_apart(aten.sigmoid.default, (13,), x), wanted)


def test_rows_apart_broadcasts_what_all_steps_share() -> None:
    x, y = torch.randn(5, 3, 4), torch.randn(4)
    wanted = torch.stack([aten.pow.Tensor_Tensor(row.abs(), y) for row in x])
    found = rows_apart(aten.pow.Tensor_Tensor, (3, 4), x.abs(), y)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted)
    scalar = torch.randn(7)
    assert rows_apart(aten.sigmoid.default, (), scalar).shape == (7,)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_indexing_at_all_steps(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dim = data.draw(st.integers(0, len(shape) - 1))
    steps = data.draw(st.integers(1, 6))
    places = data.draw(st.lists(st.integers(-shape[dim], shape[dim] - 1), min_size=steps, max_size=steps))
    whole, own = torch.randn(shape), torch.randn(steps, *shape)
    assert torch.equal(select_each(whole, dim, places), torch.stack([whole.select(dim, i) for i in places]))
    wanted = torch.stack([v.select(dim, i) for v, i in zip(own, places, strict=True)])
    assert torch.equal(select_own(own, dim, places), wanted)
    length = data.draw(st.integers(1, shape[dim]))
    starts = data.draw(st.lists(st.integers(0, shape[dim] - length), min_size=steps, max_size=steps))
    parts = torch.stack([whole.narrow(dim, s, length) for s in starts])
    assert torch.equal(slice_each(whole, dim, starts, length), parts)


def test_a_range_selects_by_a_view() -> None:
    whole = torch.randn(3, 10)
    found = select_each(whole, 1, range(1, 10, 3))
    assert torch.equal(found, whole[:, 1::3].t())
    assert found.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_numbers_have_the_dtype_of_what_they_meet() -> None:
    like = torch.zeros(2, dtype=torch.bfloat16)
    found = numbers((0.1, 0.2, 0.3), [3, 1], like)
    assert found.dtype is torch.bfloat16
    assert found.shape == (3, 1)


def test_a_batched_map_takes_a_maps_place() -> None:
    xs = torch.randn(4, 3)
    loop = make_loop(lambda x: (aten.exp.default(x),), 4, [Scanned(0, 0, range(4))], [Stacked(0), Step(0, 2)], [xs])
    graph = fx.Graph()
    values = graph.call_function(aten.exp.default, (graph.placeholder("xs"),))
    graph.output((values, graph.call_function(aten.select.int, (values, 0, 2))))
    block = BatchedMap(loop, fx.GraphModule({}, graph), "1 direct")
    for found, wanted in zip(block(xs), loop(xs), strict=True):
        assert torch.equal(found, wanted)
    assert block.last is not None
    assert block.last.sweeps == 1
    assert "4 equations" in repr(block)


def test_a_recurrence_is_refused() -> None:
    h = torch.randn(3)
    loop = make_loop(lambda x: (aten.exp.default(x),), 4, [Carried(0, 1, (0,))], [Step(0, 3)], [h])
    with pytest.raises(PassError, match="depend on one another"):
        BatchedMap(loop, loop.body, "")


def test_a_maps_constants_are_made_once_and_never_handed_out() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(numbers, ((1.0, 2.0, 3.0), (3, 1), x))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (x, made)), made))
    loop = make_loop(lambda x: (x, x), 3, [Scanned(0, 0, range(3))], [Stacked(0), Stacked(1)], [torch.zeros(3, 2)])
    block = BatchedMap(loop, fx.GraphModule({}, graph), "")
    added, constant = block(torch.zeros(3, 2))
    assert added.tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    assert len(block._constants) == 1
    constant.zero_()  # the caller's to write to
    assert torch.equal(block(torch.zeros(3, 2))[0], added)
    assert len(block._constants) == 1
