"""Fixed-point iterations as captured steps, on the CPU double: the answers of the uncaptured block, and no host reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings

from fxjacobi.certificate import Certificate
from fxjacobi.device import installed
from fxjacobi.fixed_point import FixedPoint
from fxjacobi.loops import Carried, Invariant, Loop, Result, Step
from fxjacobi.testing.graph_double import GraphDouble, host_reads
from tests.unit.loop_makers import make_loop, same_bits
from tests.unit.test_fixed_point import cycle, walks

if TYPE_CHECKING:
    from collections.abc import Sequence

aten = torch.ops.aten


def captured(
    loop: Loop, operands: Sequence[torch.Tensor]
) -> tuple[FixedPoint, tuple[Any, ...], GraphDouble, list[str]]:
    """Return the block after an uncaptured call and a captured one, and what the latter returned."""
    block, double = FixedPoint(loop), GraphDouble()
    with installed("cpu", double), torch.no_grad():
        block(*operands)
        with host_reads() as reads:
            results = block(*operands)
    return block, results, double, reads


@settings(max_examples=40, deadline=None)
@given(walks())
def test_results_are_those_of_the_full_run(walk: tuple[Loop, list[torch.Tensor]]) -> None:
    loop, operands = walk
    block, results, double, reads = captured(loop, operands)
    assert same_bits(results, loop(*operands))
    if double.captures:
        assert not reads
        assert block.last is not None
        assert block.last.sweeps <= loop.trip_count


@pytest.mark.parametrize(("length", "tail"), [(1, 11), (7, 20), (3, 0), (100, 0)])
@pytest.mark.parametrize("trip_count", [2, 23, 50, 97])
def test_the_phase_of_every_cycle_is_kept(length: int, tail: int, trip_count: int) -> None:
    loop, operands = cycle(length, tail, trip_count, Step(0, trip_count - 1))
    block, results, double, reads = captured(loop, operands)
    assert same_bits(results, loop(*operands))
    assert double.captures == 1
    assert not reads
    plain = FixedPoint(loop)
    plain(*operands)
    assert block.last is not None
    assert plain.last is not None
    if plain.last.certificate is Certificate.REPEATED and plain.last.sweeps < trip_count - 1:
        assert block.last == plain.last
    assert block.last.sweeps <= trip_count


def test_the_flag_is_read_one_sweep_late_and_the_extra_sweep_changes_nothing() -> None:
    loop, operands = cycle(1, 11, 1000, Step(0, 999))
    block, results, double, _ = captured(loop, operands)
    assert block.last is not None
    assert block.last.sweeps == 12
    # Once while the captured form was checked and once for the call: 12 steps and the one that was on its way.
    assert double.lateness == 2 * [*[1] * 12, 0]
    assert double.replays == 2 * 13
    assert same_bits(results, loop(*operands))


def test_results_survive_the_next_call() -> None:
    loop, operands = cycle(1, 11, 1000, Step(0, 999))
    other = [operands[0].flip(0), operands[1]]
    block, first, double, _ = captured(loop, operands)
    kept = [value.clone() for value in first]
    with installed("cpu", double), torch.no_grad():
        second = block(*other)
    assert same_bits(first, kept)
    assert same_bits(second, loop(*other))


def test_a_state_laid_out_otherwise_than_its_successors_leads_in_uncaptured() -> None:
    def body(x: Any) -> tuple[Any, ...]:
        return (aten.add.Tensor(aten.mul.Tensor(x, 0.5), 0.25),)

    start = torch.randn(6, 4).t()[:, 1:5]  # strided, and not where new tensors start
    results: list[Result] = [Step(0, 199)]
    loop = make_loop(lambda x: (aten.clone.default(body(x)[0], memory_format=torch.contiguous_format),), 200,
                     [Carried(0, 1, (0,))], results, [start])  # fmt: skip
    block, found, double, _ = captured(loop, [start])
    assert double.captures == 1
    assert same_bits(found, loop(start))
    assert block.reason.endswith("each step is a captured graph")


def test_states_that_change_places_are_not_overwritten_too_early() -> None:
    def body(x: Any, y: Any, c: Any) -> tuple[Any, ...]:
        return (y, aten.minimum.default(x, c))

    operands = [torch.tensor([5.0]), torch.tensor([7.0]), torch.tensor([3.0])]
    bindings = [Carried(0, 1, (0,)), Carried(1, 1, (1,)), Invariant(2)]
    loop = make_loop(body, 40, bindings, [Step(0, 39), Step(1, 39)], operands)
    _, found, double, _ = captured(loop, operands)
    assert double.captures == 1
    assert same_bits(found, loop(*operands))


def test_a_step_that_reads_a_value_back_is_refused_with_the_reason() -> None:
    def body(x: Any, y: Any) -> tuple[Any, ...]:
        return (aten.add.Tensor(x, aten.sum.default(aten.masked_select.default(y, aten.gt.Scalar(y, 0)))),)

    operands = [torch.zeros(1), torch.zeros(4)]
    loop = make_loop(body, 30, [Carried(0, 1, (0,)), Invariant(1)], [Step(0, 29)], operands)
    block, found, double, _ = captured(loop, operands)
    assert double.captures == 0
    assert same_bits(found, loop(*operands))
    assert "runs uncaptured: the shape of what masked_select returns depends on data" in block.reason


def test_parameters_are_read_where_they_are_and_other_operands_are_copied() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.5]))
    operands: list[torch.Tensor] = [torch.ones(1), weight, torch.ones(1)]

    def body(x: Any, w: Any, c: Any) -> tuple[Any, ...]:
        return (aten.add.Tensor(aten.mul.Tensor(x, w), c),)

    loop = make_loop(body, 100, [Carried(0, 1, (0,)), Invariant(1), Invariant(2)], [Step(0, 99)], operands)
    block, _, double, _ = captured(loop, operands)
    with installed("cpu", double), torch.no_grad():
        weight.mul_(0.5)
        assert same_bits(
            block(torch.ones(1), weight, torch.full((1,), 3.0)), loop(torch.ones(1), weight, torch.full((1,), 3.0))
        )
        assert double.captures == 1
        weight.data = torch.tensor([0.125])  # other memory: captured anew
        assert same_bits(block(*operands), loop(*operands))
        assert double.captures == 2
        assert same_bits(block(*operands), loop(*operands))


def test_results_keep_their_strides() -> None:
    def body(x: Any) -> tuple[Any, ...]:
        wide = aten.cat.default([aten.clamp.default(aten.add.Tensor(x, 1.0), -5.0, 5.0), x], 1)
        return aten.clone.default(aten.slice.Tensor(wide, 1, 0, 2)), aten.slice.Tensor(wide, 1, 1, 3)

    start = torch.zeros(3, 2)
    loop = make_loop(body, 30, [Carried(0, 1, (0,))], [Step(0, 29), Step(1, 29)], [start])
    block, found, double, _ = captured(loop, [start])
    wanted = loop(start)
    assert double.captures == 1
    assert "uncaptured" not in block.reason
    assert same_bits(found, wanted)
    assert [f.stride() for f in found] == [w.stride() for w in wanted]
    assert not found[1].is_contiguous()


def test_a_fault_of_the_device_form_does_not_take_the_result_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxjacobi.device.state import CarriedState

    def broken(*_: Any) -> Any:
        raise IndexError("a defect")

    monkeypatch.setattr(CarriedState, "of", broken)
    loop, operands = cycle(1, 11, 100, Step(0, 99))
    block, found, double, _ = captured(loop, operands)
    assert double.captures == 0
    assert same_bits(found, loop(*operands))
    assert "IndexError: a defect); please report this" in block.reason
