from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fxjacobi.certificate import Certificate, Solution
from fxjacobi.errors import PassError
from fxjacobi.fixed_point import FixedPoint, same_bits
from fxjacobi.loops import Carried, Invariant, Loop, Result, Scanned, Stacked, Step
from tests.unit.loop_makers import make_loop
from tests.unit.loop_makers import same_bits as equal_results

aten = torch.ops.aten


@st.composite
def walks(draw: st.DrawFn) -> tuple[Loop, list[torch.Tensor]]:
    """``x_t = table[(x_{t-1} + x_{t-d}) mod n]``: every such walk ends in a cycle, of any length."""
    n, trip_count, distance = draw(st.integers(1, 6)), draw(st.integers(1, 70)), draw(st.integers(1, 3))
    table = torch.tensor(draw(st.lists(st.integers(0, n - 1), min_size=n, max_size=n)))
    starts = [torch.tensor(draw(st.integers(0, n - 1))) for _ in range(distance + 1)]

    def body(x: Any, y: Any, table: Any) -> Any:
        index = aten.remainder.Scalar(aten.add.Tensor(x, y), n) if distance > 1 else x
        return (aten.index_select.default(table, 0, index), aten.neg.default(x))

    steps = st.integers(0, trip_count - 1)
    result = st.builds(Step, st.integers(0, 1), steps) | st.builds(Stacked, st.integers(0, 1))
    results = draw(st.lists(result | st.just(Step(0, trip_count - 1)), min_size=1, max_size=3))
    operands = [table, *(s.reshape(1) for s in starts)]
    bindings = [Carried(0, 1, (1,)), Carried(0, distance, tuple(range(2, 2 + distance))), Invariant(0)]
    return make_loop(body, trip_count, bindings, results, operands), operands


@settings(max_examples=150, deadline=None)
@given(walks())
def test_results_are_those_of_the_full_run(walk: tuple[Loop, list[torch.Tensor]]) -> None:
    loop, operands = walk
    block = FixedPoint(loop)
    found = block(*operands)
    assert equal_results(found, loop(*operands))
    assert block.last is not None
    assert block.last.sweeps <= loop.trip_count
    ordinary, mine = ([r.data_ptr() for r in results] for results in (loop(*operands), found))
    assert [mine.index(p) for p in mine] == [ordinary.index(p) for p in ordinary], "results share memory"


def cycle(length: int, tail: int, trip_count: int, *results: Result) -> tuple[Loop, list[torch.Tensor]]:
    """A walk with ``tail`` states before a cycle of ``length``."""
    n = tail + length
    table = torch.tensor([*range(1, n), tail])
    operands = [table, torch.zeros(1, dtype=torch.int64)]
    bindings = [Carried(0, 1, (1,)), Invariant(0)]
    loop = make_loop(lambda x, t: (aten.index_select.default(t, 0, x),), trip_count, bindings, results, operands)
    return loop, operands


def test_a_fixed_point_is_found_at_its_first_repeat() -> None:
    loop, operands = cycle(1, 11, 1000, Step(0, 999))
    block = FixedPoint(loop)
    assert equal_results(block(*operands), loop(*operands))
    assert block.last == Solution(12, Certificate.REPEATED)


def test_a_cycle_is_found_and_its_phase_kept() -> None:
    for last in range(990, 1000):
        loop, operands = cycle(7, 20, 1000, Step(0, last))
        block = FixedPoint(loop)
        assert equal_results(block(*operands), loop(*operands))
        assert block.last is not None
        assert block.last.certificate is Certificate.CYCLED
        assert block.last.sweeps < 60


def test_a_loop_that_never_repeats_runs_in_full() -> None:
    loop, operands = cycle(100, 0, 50, Stacked(0))
    block = FixedPoint(loop)
    assert equal_results(block(*operands), loop(*operands))
    assert block.last == Solution(50, Certificate.SEQUENTIAL)


def flipping() -> tuple[Loop, list[torch.Tensor]]:
    """``x_t = -x_{t-1}`` at zero: IEEE equality sees no change, and 1/x does."""
    operands = [torch.zeros(3)]
    body = lambda x: (aten.neg.default(x), aten.reciprocal.default(x))  # noqa: E731
    return make_loop(body, 6, [Carried(0, 1, (0,))], [Step(1, 4), Step(1, 5)], operands), operands


def test_the_sign_of_zero_is_a_difference() -> None:
    loop, operands = flipping()
    block = FixedPoint(loop)
    found = block(*operands)
    assert equal_results(found, loop(*operands))
    assert not torch.equal(found[0], found[1])
    assert block.last is not None
    assert block.last.certificate is Certificate.CYCLED


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor([True, False]), torch.tensor([True, False]), True),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), True),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j]), True),
        (torch.tensor([1 + 2j]), torch.tensor([1 - 2j]), False),
        (torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16), True),
        (torch.ones(2), torch.ones(2, dtype=torch.float64), False),
        (torch.ones(2, 3), torch.ones(3, 2).t(), False),
    ],
)
def test_same_bits(a: torch.Tensor, b: torch.Tensor, same: bool) -> None:
    assert same_bits(a, b) is same


def test_nan_states_repeat() -> None:
    operands = [torch.tensor([float("nan"), 1.0])]
    loop = make_loop(lambda x: (aten.mul.Tensor(x, x),), 100, [Carried(0, 1, (0,))], [Step(0, 99)], operands)
    block = FixedPoint(loop)
    assert equal_results(block(*operands), loop(*operands))
    assert block.last == Solution(1, Certificate.REPEATED)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(1, 60))
@example(0, 1)
def test_autoregressive_inverse(seed: int, trip_count: int) -> None:
    """A strictly triangular map reaches its fixed point after as many sweeps as it has rows."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 12, generator=generator).tril(-1)
    operands = [torch.zeros(4, 12), torch.randn(4, 12, generator=generator), weight.t().contiguous()]

    def body(x: Any, z: Any, w: Any) -> Any:
        return (aten.add.Tensor(z, aten.tanh.default(aten.mm.default(x, w))),)

    bindings = [Carried(0, 1, (0,)), Invariant(1), Invariant(2)]
    loop = make_loop(body, trip_count, bindings, [Step(0, trip_count - 1)], operands)
    block = FixedPoint(loop)
    assert equal_results(block(*operands), loop(*operands))
    assert block.last is not None
    assert block.last.sweeps <= 13


def test_other_loops_are_refused() -> None:
    operands = [torch.randn(4, 3), torch.randn(3)]
    bindings = [Scanned(0, 0, range(4)), Carried(0, 1, (1,))]
    loop = make_loop(lambda x, h: (aten.add.Tensor(x, h),), 4, bindings, [Step(0, 3)], operands)
    with pytest.raises(PassError, match="fixed-point"):
        FixedPoint(loop)


def inverse(trip_count: int, scale: float, triangular: bool, *results: Result) -> tuple[Loop, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    weight = scale * torch.randn(5, 5, generator=generator, dtype=torch.float64)
    start = torch.zeros(3, 5, dtype=torch.float64)
    operands = [
        start,
        torch.randn(3, 5, generator=generator, dtype=torch.float64),
        weight.triu(1) if triangular else weight,
    ]

    def body(x: Any, z: Any, w: Any) -> Any:
        new = aten.add.Tensor(z, aten.tanh.default(aten.mm.default(x, w)))
        return (new, aten.exp.default(new))

    bindings = [Carried(0, 1, (0,)), Invariant(1), Invariant(2)]
    return make_loop(body, trip_count, bindings, results, operands), operands


@pytest.mark.parametrize("triangular", [True, False])
@pytest.mark.parametrize("trip_count", [3, 7, 200])
def test_gradients_are_those_of_the_full_run(trip_count: int, triangular: bool) -> None:
    results = [Step(0, trip_count - 1), Step(1, trip_count - 1), Step(1, trip_count // 2), Step(0, 1)]
    loop, operands = inverse(trip_count, 0.3, triangular, *results)
    block = FixedPoint(loop)
    gradients = []
    for run in (block, loop):
        leaves = [o.clone().requires_grad_() for o in operands]
        values = run(*leaves)
        loss = torch.stack([(v * (i + 1)).sin().sum() for i, v in enumerate(values)]).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for found, wanted in zip(*gradients, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-14)
    assert block.last is not None
    if trip_count == 200:
        assert block.last.certificate is Certificate.REPEATED
        assert block.last.sweeps < 60


def test_gradients_pass_gradcheck() -> None:
    loop, operands = inverse(40, 0.3, True, Step(0, 39), Step(1, 39))
    block = FixedPoint(loop)
    leaves = [o.clone().requires_grad_() for o in operands]
    assert torch.autograd.gradcheck(block, leaves)
    assert block.last is not None
    assert block.last.certificate is Certificate.REPEATED


def test_an_adjoint_that_repeats_is_summed() -> None:
    """``x <- max(x, z)`` keeps the adjoint of x as it is for as many steps as there are."""
    operands = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)]

    def body(x: Any, z: Any) -> Any:
        return (aten.add.Tensor(x, aten.mul.Tensor(aten.sub.Tensor(z, z), x)),)

    loop = make_loop(body, 50, [Carried(0, 1, (0,)), Invariant(1)], [Step(0, 49)], operands)
    block = FixedPoint(loop)
    gradients = []
    for run in (block, loop):
        leaves = [o.clone().requires_grad_() for o in operands]
        gradients.append(torch.autograd.grad(run(*leaves)[0].sum(), leaves))
    for found, wanted in zip(*gradients, strict=True):
        assert torch.allclose(found, wanted)
    assert block.last == Solution(1, Certificate.REPEATED)


def test_a_wrong_adjoint_would_be_seen() -> None:
    """The gradient of the repeat alone, without the equal steps before it, is not the gradient."""
    loop, operands = inverse(200, 0.3, False, Step(0, 199))
    leaves = [o.clone().requires_grad_() for o in operands]
    (wanted,) = torch.autograd.grad(loop(*leaves)[0].sum(), leaves[1:2])
    with torch.no_grad():
        fixed = FixedPoint(loop)(*operands)[0]
    once = [o.clone().requires_grad_() for o in operands]
    (single,) = torch.autograd.grad(loop.body(fixed, once[1], once[2])[0].sum(), once[1:2])
    assert not torch.allclose(single, wanted, rtol=1e-3)
