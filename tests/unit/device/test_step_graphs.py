"""Loops in order as captured blocks of steps, on the CPU double: the bits of the loop, no host reads, few replays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxjacobi import ops
from fxjacobi.device import installed
from fxjacobi.device import step_graphs as module
from fxjacobi.device.step_graphs import StepGraphs
from fxjacobi.errors import GuardFailed
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked, Step, Table
from fxjacobi.testing.graph_double import GraphDouble, host_reads
from tests.unit.loop_makers import make_loop, node, same_bits

if TYPE_CHECKING:
    from collections.abc import Sequence

aten = torch.ops.aten


def captured(
    loop: Loop, operands: Sequence[torch.Tensor], operations: int = 40
) -> tuple[StepGraphs, tuple[Any, ...], GraphDouble]:
    """Return the block after an uncaptured call and a captured one, and what the latter returned."""
    block, double = StepGraphs(loop, operations), GraphDouble()
    with installed("cpu", double), torch.no_grad():
        block(*operands)
        with host_reads() as reads:
            results = block(*operands)
    if double.captures:
        assert not reads
    return block, results, double


@st.composite
def recurrences(draw: st.DrawFn) -> tuple[Loop, list[torch.Tensor]]:
    """``h_t = tanh(h_{t-1} W + x_t) + b h_{t-d}``, scanned forwards, backwards or with gaps, along either dimension."""
    steps, distance = draw(st.integers(1, 90)), draw(st.integers(1, 3))
    width, dim, pace = draw(st.sampled_from([1, 3, 4, 16])), draw(st.integers(0, 1)), draw(st.sampled_from([1, 2, -1]))
    torch.manual_seed(draw(st.integers(0, 9)))
    length = steps * abs(pace) + 1
    shape = (length, 2, width) if dim == 0 else (2, length, width)
    x = torch.randn(shape)
    if draw(st.booleans()):
        x = torch.randn(*shape[:-1], width + 1)[..., 1:]  # rows that start anywhere
    start = 0 if pace > 0 else length - 1
    indices = [start + pace * t for t in range(steps)]
    states = [torch.randn(2, width) for _ in range(distance)]
    operands = [x, torch.randn(width, width), torch.randn(2, width), *states]

    def body(h: Any, far: Any, x: Any, w: Any) -> tuple[Any, ...]:
        new = aten.tanh.default(aten.add.Tensor(aten.mm.default(h, w), x))
        return aten.add.Tensor(new, aten.mul.Tensor(far, 0.25)), aten.neg.default(new)

    bindings = [
        Carried(0, 1, (2,)),
        Carried(0, distance, tuple(range(3, 3 + distance))),
        Scanned(0, dim, indices),
        Invariant(1),
    ]
    result = st.builds(Step, st.integers(0, 1), st.integers(0, steps - 1)) | st.builds(Stacked, st.integers(0, 1))
    results = draw(st.lists(result | st.just(Step(0, steps - 1)), min_size=1, max_size=3))
    if steps < distance:
        bindings[1] = Carried(0, distance, tuple(range(3, 3 + steps)))
    return make_loop(body, steps, bindings, results, operands), operands


@settings(max_examples=50, deadline=None)
@given(recurrences(), st.sampled_from([1, 40, 200, 8192]))
def test_the_bits_are_those_of_the_loop(made: tuple[Loop, list[torch.Tensor]], operations: int) -> None:
    loop, operands = made
    block, found, _ = captured(loop, operands, operations)
    assert same_bits(found, loop(*operands))
    assert "other bits" not in block.reason


def gru(steps: int, *results: Any) -> tuple[Loop, list[torch.Tensor]]:
    def body(h: Any, x: Any, w: Any) -> tuple[Any, ...]:
        return (aten.tanh.default(aten.add.Tensor(aten.mm.default(h, w), x)),)

    operands = [torch.randn(steps, 2, 16), torch.randn(16, 16), torch.randn(2, 16)]
    bindings = [Carried(0, 1, (2,)), Scanned(0, 0, range(steps)), Invariant(1)]
    return make_loop(body, steps, bindings, results or [Step(0, steps - 1)], operands), operands


def test_a_replay_runs_many_steps() -> None:
    loop, operands = gru(1000, Stacked(0))
    block, found, double = captured(loop, operands, operations=3 * 64)
    assert same_bits(found, loop(*operands))
    assert block.reason == "64 steps are one captured graph"
    assert double.replays == 2 * (1000 // 64)  # once to compare, once for the call; the last 40 steps run one by one
    assert double.captures == 1


def test_other_operands_are_served_and_results_are_kept() -> None:
    loop, operands = gru(70)
    block, first, double = captured(loop, operands)
    wanted = [value.clone() for value in first]
    other = [torch.randn_like(o) for o in operands]
    with installed("cpu", double), torch.no_grad():
        assert same_bits(block(*other), loop(*other))
        assert double.captures == 1
        unaligned = [torch.randn(70, 2, 17)[:, :, 1:], *other[1:]]
        assert same_bits(block(*unaligned), loop(*unaligned))
        assert double.captures == 2  # laid out otherwise: kernels may round otherwise
    assert same_bits(first, wanted)


def test_python_values_of_each_step_are_one_graph_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def body(h: Any, t: Any, x: Any) -> tuple[Any, ...]:
        return (aten.add.Tensor(aten.mul.Scalar(h, 0.5), aten.mul.Scalar(x, t)),)

    operands = [torch.randn(3), torch.randn(3)]
    bindings = [Carried(0, 1, (0,)), Literal(tuple(float(t) for t in range(50))), Invariant(1)]
    loop = make_loop(body, 50, bindings, [Stacked(0), Step(0, 7)], operands)
    block, found, double = captured(loop, operands)
    assert same_bits(found, loop(*operands))
    assert block.reason == "all steps are one captured graph"
    assert double.replays == 2
    monkeypatch.setattr(module, "_WHOLE", 99)
    block, found, double = captured(loop, operands)
    assert double.captures == 0
    assert same_bits(found, loop(*operands))
    assert "too many for one graph" in block.reason


def test_tables_are_copied_block_by_block() -> None:
    weights = [torch.randn(4, 4) for _ in range(60)]
    operands = [torch.randn(2, 4), *weights]

    def body(h: Any, w: Any) -> tuple[Any, ...]:
        return (aten.tanh.default(aten.mm.default(h, w)),)

    bindings = [Carried(0, 1, (0,)), Table(tuple(range(1, 61)))]
    loop = make_loop(body, 60, bindings, [Step(0, 59), Step(0, 3)], operands)
    _, found, double = captured(loop, operands)
    assert double.captures == 1
    assert same_bits(found, loop(*operands))


def guarded(steps: int, *, gathers: bool = False) -> tuple[Loop, list[torch.Tensor]]:
    def body(h: Any, x: Any) -> tuple[Any, ...]:
        new = aten.add.Tensor(aten.mul.Scalar(h, 0.5), x)
        node(ops.guard, aten.all.default(aten.lt.Scalar(new, 100.0)), True)
        if gathers:
            new = aten.add.Tensor(new, aten.index_select.default(x, 0, aten._to_copy.default(new, dtype=torch.int64)))
        return (new,)

    operands = [torch.rand(1), torch.rand(steps, 1) * 0.4]
    bindings = [Carried(0, 1, (0,)), Scanned(1, 0, range(steps))]
    return make_loop(body, steps, bindings, [Step(0, steps - 1)], operands), operands


def test_guards_are_checked_once_at_the_end() -> None:
    loop, operands = guarded(40)
    block, found, double = captured(loop, operands)
    assert double.captures == 1
    assert same_bits(found, loop(*operands))
    operands[1][17] = 300.0
    with installed("cpu", double), torch.no_grad(), pytest.raises(GuardFailed):
        block(*operands)


def test_a_guard_that_may_protect_an_index_is_not_put_off() -> None:
    loop, operands = guarded(40, gathers=True)
    block, found, double = captured(loop, operands)
    assert double.captures == 0
    assert same_bits(found, loop(*operands))
    assert "keeps what follows from failing on the device" in block.reason


def test_gradients_run_the_loop() -> None:
    loop, operands = gru(30)
    block, _, double = captured(loop, operands)
    operands[2].requires_grad_()
    with installed("cpu", double):
        (found,) = block(*operands)
    found.sum().backward()
    assert operands[2].grad is not None


def test_states_that_change_places_are_not_overwritten_too_early() -> None:
    def body(x: Any, y: Any, c: Any) -> tuple[Any, ...]:
        return y, aten.add.Tensor(x, c)

    operands = [torch.randn(2), torch.randn(2), torch.randn(33, 2)]
    bindings = [Carried(0, 1, (0,)), Carried(1, 1, (1,)), Scanned(2, 0, range(33))]
    loop = make_loop(body, 33, bindings, [Step(0, 32), Step(1, 32), Step(0, 8)], operands)
    for operations in (1, 3, 8):
        _, found, double = captured(loop, operands, operations)
        assert double.captures == 1
        assert same_bits(found, loop(*operands))


def test_a_body_that_draws_is_never_run_for_the_sake_of_a_capture() -> None:
    def body(h: Any, x: Any) -> tuple[Any, ...]:
        return (aten.add.Tensor(aten.mul.Scalar(h, 0.5), aten.bernoulli.p(x, 0.5)),)

    operands = [torch.zeros(3), torch.zeros(20, 3)]
    bindings = [Carried(0, 1, (0,)), Scanned(1, 0, range(20))]
    loop = make_loop(body, 20, bindings, [Step(0, 19)], operands)
    block, double = StepGraphs(loop), GraphDouble()
    with installed("cpu", double), torch.no_grad():
        for _ in range(2):
            torch.manual_seed(3)
            (found,), after = block(*operands), torch.rand(2)
            torch.manual_seed(3)
            (wanted,), expected = loop(*operands), torch.rand(2)
            assert torch.equal(found, wanted)
            assert torch.equal(after, expected)
    assert not double.captures
    assert "runs uncaptured: it draws random numbers step by step" in block.reason
