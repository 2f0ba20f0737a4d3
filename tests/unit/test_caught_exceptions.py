"""A run that goes on from an exception took a way that a graph does not hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fxjacobi.capture import record
from fxjacobi.scan import scan
from fxjacobi.verify import equal

if TYPE_CHECKING:
    from collections.abc import Callable


def _tries(x: torch.Tensor) -> torch.Tensor:
    factor: Callable[..., torch.Tensor] = torch.linalg.cholesky
    try:
        return factor(x.float())
    except RuntimeError:
        return factor(x + 10 * torch.eye(3))


class _Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(4.0)

    def forward(self, places: torch.Tensor) -> torch.Tensor:
        value = self.table[places]
        for _ in range(8):
            value = torch.tanh(value)
        return value


_table = _Table()


def _tries_a_submodule(x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(3)
    for row in range(3):  # recorded at the first row only
        try:
            total = total + _table(x[row] * 1)
        except IndexError:
            total = total * 2
    return total


def _tries_a_scan(x: torch.Tensor) -> torch.Tensor:
    def step(carry: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return carry + _table.table[row], carry

    try:
        return scan(step, torch.zeros(3), x)[0]  # type: ignore[no-any-return]
    except IndexError:
        return x * 0.5


@torch.no_grad()
@pytest.mark.parametrize("fn", [_tries, _tries_a_submodule, _tries_a_scan])
def test_an_exception_that_the_run_goes_on_from_is_refused(fn: Callable[..., Any]) -> None:
    x = torch.tensor([[0, 1, 2], [1, 1, 1], [9, 0, 0]])
    recorded = record(fn, (x,), {})
    assert "which the run went on from" in str(recorded.failure)
    assert "test_caught_exceptions.py:" in str(recorded.failure)
    assert equal(recorded.result, fn(x))
