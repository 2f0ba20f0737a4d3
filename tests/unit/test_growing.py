"""A plan says where a sequence grows, or draws depend on draws, which is why its steps are no loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import fxjacobi

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 8


def concatenated(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for _ in range(STEPS):
        x = torch.cat([x, net(x)[:, -1:].tanh()], 1)
    return x


def read_in_parts(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(2, STEPS + 1, 3)
    y[:, :1] = x
    for t in range(STEPS):
        y[:, t + 1] = net(y[:, : t + 1])[:, -1].tanh().cumsum(-1)
    return y


def counted(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(2, STEPS, 3)
    for t in range(STEPS):
        y[:, t] = torch.poisson(net(y)[:, t].exp() + x[:, 0].abs())
    return y


def neither(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = net(torch.cat([x, x.sin()], 1))[:, :1]
    return out


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (concatenated, "grows by a concatenation"),
        (read_in_parts, "growing part"),
        (counted, "its noise cannot be drawn first"),
        (neither, "no loop was found"),
    ],
)
def test_the_reason_names_the_line(function: Callable[..., torch.Tensor], why: str) -> None:
    with torch.no_grad():
        plan = fxjacobi.explain(function, nn.Linear(3, 3), torch.randn(2, 1, 3))
    assert why in plan.reason
    assert function is neither or "test_growing.py:" in plan.reason
