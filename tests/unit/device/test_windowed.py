"""Windows as captured sweeps, on the CPU double: within the tolerance, certified, the window moved on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from fxjacobi.certificate import Certificate
from fxjacobi.device import windowed as module
from fxjacobi.loops import Stacked, Step
from fxjacobi.methods.jacobi import Jacobi
from fxjacobi.methods.windowed import Windowed
from tests.unit.device.test_chunked import CONTRACT, both, recurrence

if TYPE_CHECKING:
    from fxjacobi.methods.method import Method


@pytest.fixture(autouse=True)
def host_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host computes of numbers that have arrived is no read of the device, which the double cannot tell."""
    add = module._Progress.add

    def unwatched(self: Any, numbers: Any) -> None:
        with _disable_current_modes():
            add(self, numbers)

    monkeypatch.setattr(module._Progress, "add", unwatched)


@pytest.mark.parametrize(
    "method", [Jacobi(), Windowed(16), Windowed(16, sliding=False), Windowed(40), Windowed(500), Windowed(7)]
)
@pytest.mark.parametrize("far", [1, 3])
def test_results_and_records_are_those_of_the_uncaptured_method(method: Method, far: int) -> None:
    results = Stacked(0), Step(0, 99), Step(1, 40), Stacked(1)
    loop, operands = recurrence(100, *results, far=far, batch=1)
    block, _, record, found, double, reads = both(loop, operands, method)
    assert double.captures == 3, block.reason
    assert not reads
    assert max(double.lateness) == 1
    assert block.last.certificate is Certificate.RESIDUAL
    assert block.last.prefixes == record.prefixes
    for value, wanted in zip(found, loop(*operands), strict=True):
        assert value.shape == wanted.shape
        assert float((value - wanted).abs().max()) < 1e-3


@pytest.mark.parametrize("method", [Jacobi(), Windowed(24)])
def test_what_does_not_settle_is_solved_uncaptured(method: Method) -> None:
    loop, operands = recurrence(200, scale=6.0, batch=1)
    block, wanted, record, found, double, _ = both(loop, operands, method, CONTRACT)
    assert double.captures == 3
    assert block.last.certificate is record.certificate
    if record.certificate is Certificate.FELL_BACK:
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_guess_that_is_no_number_is_put_back() -> None:
    loop, operands = recurrence(96, batch=1)
    operands[0][5, 0, 0] = float("inf")
    block, _, _, found, _, _ = both(loop, operands, Windowed(32))
    assert block.last.certificate is Certificate.RESIDUAL
    assert float((found[0] - loop(*operands)[0]).abs().max()) < 1e-3
