from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fxjacobi import ops
from fxjacobi.errors import GuardFailed
from fxjacobi.exactness import Batching, choose_ways
from fxjacobi.fixed_point import FixedPoint
from fxjacobi.graph import spec_of_value, stamp
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked, Step, Table
from fxjacobi.measuring import same_values
from fxjacobi.operation import Operation, Way
from fxjacobi.ways import ways_of
from tests.unit.loop_makers import make_loop, node, same_bits

if TYPE_CHECKING:
    from collections.abc import Iterator

aten = torch.ops.aten


def measured(loop: Loop, operands: list[torch.Tensor], **options: Any) -> Batching:
    """Choose ways and check the outcome on operands that the measurement never saw."""
    batching = choose_ways(loop, [spec_of_value(o) for o in operands], **options)
    if batching.module is not None and options.get("exact", True):
        assert same_bits(batching.module(*operands), loop(*operands))
    return batching


def ways(batching: Batching) -> dict[str, Way]:
    return {choice.operation: choice.way for choice in batching.choices}


def test_sigmoid_keeps_its_scalar_tail() -> None:
    xs = torch.randn(64, 13)
    loop = make_loop(lambda x: (aten.sigmoid.default(x),), 64, [Scanned(0, 0, range(64))], [Stacked(0)], [xs])
    batching = measured(loop, [xs])
    (choice,) = batching.choices
    assert choice.way is Way.ROWS_APART
    assert not next(t for t in choice.trials if t.way is Way.DIRECT).equal
    assert "other bits" in str(batching)


def test_a_planted_wrong_way_is_rejected() -> None:
    """Wrong in one element of a hundred, by one unit in the last place."""
    xs = torch.randn(64, 13)
    loop = make_loop(lambda x: (aten.tanh.default(x),), 64, [Scanned(0, 0, range(64))], [Stacked(0)], [xs])

    def almost(x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x)
        return torch.where(x > 2.3, torch.nextafter(y, torch.zeros(())), y)

    def planted(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
        graph = fx.Graph()
        graph.output(graph.call_function(almost, (graph.placeholder("x"),)))
        yield Way.DIRECT, fx.GraphModule({}, graph)
        yield from (found for found in ways_of(operation) if found[0] is Way.ONE_BY_ONE)

    assert 0.005 < (torch.randn(100000) > 2.3).float().mean() < 0.015
    batching = choose_ways(loop, [spec_of_value(xs)], candidates=planted)
    (choice,) = batching.choices
    assert choice.way is Way.ONE_BY_ONE
    assert not choice.trials[0].equal
    assert batching.module is None
    assert "gains nothing" in batching.reason
    # A tolerance admits the rounding, but nothing worse.
    tolerant = choose_ways(loop, [spec_of_value(xs)], exact=False, candidates=planted)
    assert tolerant.choices[0].way is Way.DIRECT


def test_a_wrong_way_is_rejected_with_a_tolerance_too() -> None:
    xs = torch.randn(32, 13)
    loop = make_loop(lambda x: (aten.tanh.default(x),), 32, [Scanned(0, 0, range(32))], [Stacked(0)], [xs])

    def planted(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
        graph = fx.Graph()
        graph.output(graph.call_function(aten.sin.default, (graph.placeholder("x"),)))
        yield Way.DIRECT, fx.GraphModule({}, graph)
        yield from ways_of(operation)

    batching = choose_ways(loop, [spec_of_value(xs)], exact=False, candidates=planted)
    assert not batching.choices[0].trials[0].equal
    assert batching.choices[0].way is not None
    assert batching.module is not None
    assert torch.allclose(batching.module(xs)[0], torch.tanh(xs))


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize(("inner", "outer"), [(16, 13), (33, 77), (64, 64), (256, 128)])
def test_linear_layers(rows: int, inner: int, outer: int) -> None:
    operands = [torch.randn(40, rows, inner), torch.randn(outer, inner), torch.randn(outer)]

    def body(x: Any, w: Any, b: Any) -> Any:
        turned = aten.t.default(w)
        return (aten.mm.default(x, turned), aten.addmm.default(b, x, turned))

    bindings = [Scanned(0, 0, range(40)), Invariant(1), Invariant(2)]
    loop = make_loop(body, 40, bindings, [Stacked(0), Stacked(1)], operands)
    batching = measured(loop, operands)
    assert set(ways(batching)) == {"aten.mm.default", "aten.addmm.default"}
    if rows * inner * outer >= 400:
        assert Way.ONE_BY_ONE not in ways(batching).values()


def test_a_network_of_images() -> None:
    operands = [torch.randn(20, 2, 3, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(4), torch.randn(4)]

    def body(x: Any, w: Any, b: Any, scale: Any, shift: Any) -> Any:
        y = aten.convolution.default(x, w, b, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        z = operator.getitem(aten.native_group_norm.default(y, scale, shift, 2, 4, 64, 2, 1e-5), 0)
        p = operator.getitem(aten.max_pool2d_with_indices.default(aten.relu.default(z), [2, 2], [2, 2]), 0)
        return (aten.mean.dim(p, [2, 3]),)

    bindings = [Scanned(0, 0, range(20)), *(Invariant(i) for i in range(1, 5))]
    loop = make_loop(body, 20, bindings, [Stacked(0)], operands)
    batching = measured(loop, operands)
    assert batching.module is not None
    assert ways(batching)["aten.convolution.default"] is Way.FLATTENED


def test_attention_embedding_and_normalisation() -> None:
    tokens = torch.randint(0, 2, (24, 2, 5))
    operands = [tokens, torch.randn(11, 16), torch.randn(16), torch.randn(16)]

    def body(x: Any, table: Any, scale: Any, shift: Any) -> Any:
        e = aten.embedding.default(table, x)
        n = operator.getitem(aten.native_layer_norm.default(e, [16], scale, shift, 1e-5), 0)
        q = aten.transpose.int(aten.view.default(n, [2, 5, 4, 4]), 1, 2)
        a = operator.getitem(aten._scaled_dot_product_flash_attention_for_cpu.default(q, q, q), 0)
        scores = aten._softmax.default(aten.bmm.default(e, aten.transpose.int(n, 1, 2)), -1, False)
        return (a, scores, aten.argmax.default(scores, -1))

    bindings = [Scanned(0, 0, range(24)), *(Invariant(i) for i in range(1, 4))]
    loop = make_loop(body, 24, bindings, [Stacked(0), Stacked(1), Step(2, 7)], operands)
    batching = measured(loop, operands)
    assert batching.module is not None
    assert Way.ONE_BY_ONE not in ways(batching).values()


def test_literals_tables_and_gathers() -> None:
    weights = list(torch.randn(12, 4, 4))
    operands = [torch.randn(3, 4), torch.randn(20, 3, 4), *weights]
    numbers = tuple(0.1 * t for t in range(12))

    def body(x: Any, rows: Any, w: Any, i: Any, start: Any, number: Any) -> Any:
        row = aten.select.int(rows, 0, i)
        y = aten.mul.Tensor(aten.bmm.default(aten.unsqueeze.default(row, 0), aten.unsqueeze.default(w, 0)), number)
        return (aten.add.Tensor(aten.squeeze.dim(y, 0), x), aten.select.int(row, 1, start), aten.mm.default(row, w))

    places = tuple((7 * t) % 20 for t in range(12))
    bindings = [
        Invariant(0), Invariant(1), Table(tuple(range(2, 14))), Literal(places),
        Literal(tuple(t % 4 for t in range(12))), Literal(numbers),
    ]  # fmt: skip
    loop = make_loop(body, 12, bindings, [Stacked(0), Stacked(1), Stacked(2)], operands)
    batching = measured(loop, operands)
    assert batching.module is not None
    assert ways(batching)["aten.select.int"] is Way.GATHERED


def test_a_window_that_moves() -> None:
    operands = [torch.randn(30, 3)]

    def body(rows: Any, start: Any, stop: Any) -> Any:
        return (aten.sum.dim_IntList(aten.slice.Tensor(rows, 0, start, stop), [0]),)

    bindings = [Invariant(0), Literal(tuple(range(20))), Literal(tuple(range(5, 25)))]
    loop = make_loop(body, 20, bindings, [Stacked(0)], operands)
    batching = measured(loop, operands)
    assert ways(batching)["aten.slice.Tensor"] is Way.GATHERED


def test_guards_check_all_steps_at_once() -> None:
    operands = [torch.tensor([1.0, 2.0, 3.0, 4.0] * 8)]

    def body(x: Any, wanted: Any) -> Any:
        node(ops.guard, aten.gt.Scalar(x, 2.5), wanted)
        return (aten.exp.default(x),)

    bindings = [Scanned(0, 0, range(32)), Literal((False, False, True, True) * 8)]
    loop = make_loop(body, 32, bindings, [Stacked(0)], operands)
    batching = measured(loop, operands)
    assert batching.module is not None
    assert "guard_steps" in batching.module.code
    with pytest.raises(GuardFailed):
        batching.module(torch.ones(32))


def inner_loop(trip_count: int, operands: list[torch.Tensor]) -> Loop:
    def body(h: Any, x: Any, w: Any, number: Any) -> Any:
        new = aten.tanh.default(aten.add.Tensor(aten.mm.default(h, w), aten.mul.Tensor(x, number)))
        return (new,)

    bindings = [Carried(0, 1, (0,)), Scanned(1, 0, range(trip_count)), Invariant(2), Literal((0.5,) * trip_count)]
    return make_loop(body, trip_count, bindings, [Step(0, trip_count - 1), Stacked(0)], operands)


def outer(inner: torch.nn.Module, names: str) -> fx.GraphModule:
    graph = fx.Graph()
    call = graph.call_module("inner", tuple(stamp(graph.placeholder(name), None) for name in names))
    last, every = (graph.call_function(operator.getitem, (call, i)) for i in range(2))
    graph.output((graph.call_function(aten.exp.default, (last,)), every))
    return fx.GraphModule({"inner": inner}, graph)


def test_an_inner_recurrence_runs_once_for_all_outer_steps() -> None:
    operands = [torch.zeros(8, 16), torch.randn(30, 5, 8, 16), torch.randn(16, 16) / 4]
    inner = inner_loop(5, [operands[0], operands[1][0], operands[2]])
    bindings = [Invariant(0), Scanned(1, 0, range(30)), Invariant(2)]
    loop = make_loop(outer(inner, "hxw"), 30, bindings, [Stacked(0), Stacked(1)], operands)
    batching = measured(loop, operands)
    assert batching.module is not None
    assert ways(batching)["inner"] is Way.INTERCHANGED
    inside = [m for m in batching.module.modules() if isinstance(m, Loop)]
    assert [m.trip_count for m in inside] == [5]


def test_an_inner_fixed_point_stops_when_all_outer_steps_have() -> None:
    operands = [torch.zeros(4, 16), torch.randn(30, 4, 16), (torch.randn(16, 16) / 4).tril(-1)]

    def body(y: Any, x: Any, w: Any) -> Any:
        return (aten.add.Tensor(aten.tanh.default(aten.mm.default(y, w)), x),)

    bindings = [Carried(0, 1, (0,)), Invariant(1), Invariant(2)]
    inner = make_loop(body, 50, bindings, [Step(0, 49), Step(0, 3)], [operands[0], operands[1][0], operands[2]])
    bindings = [Invariant(0), Scanned(1, 0, range(30)), Invariant(2)]
    loop = make_loop(outer(FixedPoint(inner), "yxw"), 30, bindings, [Stacked(0), Stacked(1)], operands)
    batching = measured(loop, operands)
    assert batching.module is not None
    (block,) = (m for m in batching.module.modules() if isinstance(m, FixedPoint))
    assert block.last is not None
    assert block.last.sweeps < 30


def test_a_submodule_is_batched_like_the_body() -> None:
    operands = [torch.randn(20, 8, 16), torch.randn(16, 16)]
    part = make_loop(
        lambda x, w: (aten.relu.default(aten.mm.default(x, w)), x), 1, [Scanned(0, 0, range(1)), Invariant(1)],
        [Step(0, 0)], operands,
    ).body  # fmt: skip
    bindings = [Scanned(0, 0, range(20)), Invariant(1)]
    loop = make_loop(outer(part, "xw"), 20, bindings, [Stacked(0), Stacked(1)], operands)
    batching = measured(loop, operands)
    assert batching.module is not None
    assert not any(n.op == "call_module" for n in batching.module.graph.nodes)


def test_what_cannot_be_batched_goes_one_by_one_in_its_own_layout() -> None:
    """A column sum of a slice: the stack would lay it out otherwise."""
    operands = [torch.randn(16, 7, 5)]

    def body(x: Any) -> Any:
        part = aten.slice.Tensor(aten.mul.Tensor(x, 2.0), 1, 0, 3)
        return (aten.exp.default(part),)

    loop = make_loop(body, 16, [Scanned(0, 0, range(16))], [Stacked(0)], operands)

    def only_single(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
        yield from (found for found in ways_of(operation) if found[0] is Way.ONE_BY_ONE)

    batching = choose_ways(loop, [spec_of_value(o) for o in operands], candidates=only_single)
    assert [c.way for c in batching.choices] == [Way.ONE_BY_ONE] * 3
    assert batching.module is None
    assert "gains nothing" in batching.reason


def test_data_that_an_operation_refuses_is_a_reason() -> None:
    operands = [torch.eye(3).expand(8, 3, 3).contiguous()]
    body = lambda x: (aten.linalg_cholesky_ex.default(x, check_errors=True)[0],)  # noqa: E731
    loop = make_loop(body, 8, [Scanned(0, 0, range(8))], [Stacked(0)], operands)
    batching = choose_ways(loop, [spec_of_value(o) for o in operands])
    assert batching.module is None
    assert "random data" in batching.reason


def test_gradients_flow_through_the_batched_graph() -> None:
    operands = [torch.randn(12, 4, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)]

    def body(x: Any, w: Any, number: Any) -> Any:
        y = aten.sigmoid.default(aten.mm.default(x, w))
        n = operator.getitem(aten.native_layer_norm.default(y, [6], None, None, 1e-5), 0)
        return (aten.mul.Tensor(n, number), aten.select.int(y, 1, 2))

    bindings = [Scanned(0, 0, range(12)), Invariant(1), Literal(tuple(0.1 * t for t in range(12)))]
    loop = make_loop(body, 12, bindings, [Stacked(0), Step(1, 3)], operands)
    batching = measured(loop, operands)
    assert batching.module is not None
    found = [o.clone().requires_grad_() for o in operands]
    wanted = [o.clone().requires_grad_() for o in operands]
    sum(r.square().sum() for r in batching.module(*found)).backward()
    sum(r.square().sum() for r in loop(*wanted)).backward()
    for a, b in zip(found, wanted, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_choices_are_remembered() -> None:
    xs = torch.randn(50, 3, 7)
    loop = make_loop(lambda x: (aten.cos.default(x),), 50, [Scanned(0, 0, range(50))], [Stacked(0)], [xs])
    first = measured(loop, [xs])
    again = measured(loop, [xs])
    assert again.choices[0].trials is first.choices[0].trials


def test_measuring_leaves_the_random_state_alone() -> None:
    xs = torch.randn(9, 5)
    loop = make_loop(lambda x: (aten.erf.default(x),), 9, [Scanned(0, 0, range(9))], [Stacked(0)], [xs])
    state = torch.get_rng_state()
    measured(loop, [xs])
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.sampled_from(["bit", "sign", "nan", "shape", "dtype"]))
def test_same_values_sees_one_bit(position: int, what: str) -> None:
    wanted = torch.arange(10, dtype=torch.float32)
    wanted[3] = torch.nan
    found = wanted.clone()
    assert same_values(found, wanted, exact=True)
    match what:
        case "bit":
            found.view(torch.int32)[position] ^= 1 if position != 3 else 1 << 31
        case "sign":
            found[0] = -0.0
        case "nan":
            found[position] = 1e9
        case "shape":
            found = found[None]
        case _:
            found = found.double()
    # Another NaN is the same value.
    assert same_values(found, wanted, exact=True) is (what == "bit" and position == 3)
