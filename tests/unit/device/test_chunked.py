"""Chunks as captured sweeps, on the CPU double: within the tolerance, certified, decided one sweep late."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from fxjacobi.certificate import Certificate
from fxjacobi.device import chunked as module
from fxjacobi.device import installed
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked, Step
from fxjacobi.methods.chunked import Chunked
from fxjacobi.methods.method import Contract
from fxjacobi.methods.picard import Picard
from fxjacobi.solved_loop import SolvedLoop
from fxjacobi.testing.graph_double import GraphDouble, host_reads
from tests.unit.loop_makers import make_loop

aten = torch.ops.aten
CONTRACT = Contract(rtol=1e-4)


def recurrence(
    steps: int, *results: Any, scale: float = 0.5, far: int = 1, batch: int = 3
) -> tuple[Loop, list[torch.Tensor]]:
    def body(h: Any, g: Any, x: Any, w: Any) -> tuple[Any, ...]:
        new = aten.tanh.default(aten.add.Tensor(aten.mm.default(h, w), x))
        return aten.add.Tensor(new, aten.mul.Scalar(g, 0.1)), aten.neg.default(new)

    torch.manual_seed(0)
    weight = torch.randn(8, 8) * scale / 8**0.5
    operands = [torch.randn(steps, batch, 8), weight, *(torch.randn(batch, 8) for _ in range(far + 1))]
    bindings = [
        Carried(0, 1, (2,)),
        Carried(0, far, tuple(range(3, 3 + far))),
        Scanned(0, 0, range(steps)),
        Invariant(1),
    ]
    return make_loop(body, steps, bindings, results or [Stacked(0)], operands), operands


@pytest.fixture(autouse=True)
def host_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host computes of numbers that have arrived is no read of the device, which the double cannot tell."""
    add = module._Progress.add

    def unwatched(self: Any, numbers: Any) -> None:
        with _disable_current_modes():
            add(self, numbers)

    monkeypatch.setattr(module._Progress, "add", unwatched)
    monkeypatch.setattr(module, "_LONG_S", math.inf)


def both(loop: Loop, operands: list[torch.Tensor], method: Any, contract: Contract = CONTRACT) -> Any:
    block, double = SolvedLoop(loop, method, contract), GraphDouble()
    with torch.no_grad(), installed("cpu", double):
        wanted = block(*operands)
        record = block.last
        with host_reads() as reads:
            found = block(*operands)
    return block, wanted, record, found, double, reads


@pytest.mark.parametrize("steps", [64, 96, 100, 131])
@pytest.mark.parametrize("warm_up", [0, 12])
@pytest.mark.parametrize("far", [1, 3])
def test_results_are_within_the_tolerance_and_certified(steps: int, warm_up: int, far: int) -> None:
    # One sample: uncaptured, those that have settled are left out, which changes what later updates are.
    results = Stacked(0), Step(0, steps - 1), Step(1, 40), Stacked(1)
    loop, operands = recurrence(steps, *results, far=far, batch=1)
    block, _, record, found, double, reads = both(loop, operands, Chunked(16, warm_up))
    assert double.captures == 3, block.reason
    assert not reads
    assert block.last.certificate is Certificate.RESIDUAL
    if steps % 16 == 0 and not warm_up:  # uncaptured, other chunks are made even and have their warm-up in their rows
        assert block.last.sweeps == record.sweeps
        assert block.last.prefixes == record.prefixes
    assert abs(block.last.sweeps - record.sweeps) <= 1
    for value, wanted in zip(found, loop(*operands), strict=True):
        assert value.shape == wanted.shape
        assert float((value - wanted).abs().max()) < 1e-3
    assert block.reason.endswith("each sweep is a captured graph")


@pytest.mark.parametrize("long", [False, True])
def test_the_decision_is_one_sweep_late_unless_sweeps_are_long(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONG_S", 0.0 if long else math.inf)
    loop, operands = recurrence(256)
    block, _, _, _, double, _ = both(loop, operands, Chunked(16))
    # Adopting ran the three programs once each, timed a sweep and solved; each solve starts, sweeps once more than needed
    # unless it waits, and checks.
    assert double.replays == 3 + 1 + 2 * (1 + block.last.sweeps + (not long) + 1)
    assert max(double.lateness) == (not long)


def test_other_operands_are_served_and_results_kept() -> None:
    loop, operands = recurrence(96)
    block, _, _, first, double, _ = both(loop, operands, Chunked(16))
    kept = [value.clone() for value in first]
    other = [torch.randn_like(operands[0]), *operands[1:]]
    with torch.no_grad(), installed("cpu", double):
        (found,) = block(*other)
    assert double.captures == 3
    assert float((found - loop(*other)[0]).abs().max()) < 1e-3
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_what_does_not_settle_is_solved_uncaptured() -> None:
    loop, operands = recurrence(96, scale=6.0)  # chaotic: chunks pass errors on for ever
    block, wanted, record, found, double, _ = both(loop, operands, Chunked(8), Contract(rtol=1e-6, max_sweeps=2))
    assert double.captures == 3
    assert record.certificate is Certificate.FELL_BACK
    assert block.last.certificate is record.certificate
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_chunk_that_starts_at_no_number_is_put_back() -> None:
    loop, operands = recurrence(96)
    operands[0][5, 0, 0] = float("inf")  # tanh(inf) = 1: the states stay finite
    block, _, _, found, _, _ = both(loop, operands, Chunked(16))
    assert block.last.certificate is Certificate.RESIDUAL
    assert float((found[0] - loop(*operands)[0]).abs().max()) < 1e-3


def test_python_values_of_each_step() -> None:
    def body(h: Any, t: Any, x: Any) -> tuple[Any, ...]:
        return (aten.mul.Scalar(aten.tanh.default(aten.add.Tensor(aten.mul.Tensor(h, t), x)), 0.5),)

    operands = [torch.randn(2, 4), torch.randn(2, 4)]
    bindings = [Carried(0, 1, (0,)), Literal(tuple(t / 200 for t in range(128))), Invariant(1)]
    loop = make_loop(body, 128, bindings, [Stacked(0)], operands)
    block, _, _, found, double, reads = both(loop, operands, Chunked(16))
    assert double.captures == 3, block.reason
    assert not reads
    assert float((found[0] - loop(*operands)[0]).abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("method", "contract", "reason"),
    [
        (Picard(), CONTRACT, "the sweeps of Picard have no captured form"),
        (Chunked(64), CONTRACT, "one chunk is the ordinary order"),
    ],
)
def test_what_has_no_captured_sweeps_says_so(method: Any, contract: Contract, reason: str) -> None:
    loop, operands = recurrence(64)
    block, _, _, found, double, _ = both(loop, operands, method, contract)
    assert double.captures == 0
    assert f"runs uncaptured: {reason}" in block.reason
    assert float((found[0] - loop(*operands)[0]).abs().max()) < 1e-3


def test_a_form_that_never_finishes_is_given_up() -> None:
    loop, operands = recurrence(96, scale=6.0)
    block, double = SolvedLoop(loop, Chunked(8), Contract(rtol=1e-6, max_sweeps=2)), GraphDouble()
    with torch.no_grad(), installed("cpu", double):
        for _ in range(5):
            block(*operands)
        replays = double.replays
        block(*operands)
    assert double.replays == replays
    assert "several times in a row" in block.reason
