"""What the plan says of loops that fill an array in ways that are not seen to be one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import fxjacobi

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 8
WEIGHT = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).tril(-1)


def net(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) @ WEIGHT.T


def by_a_mask_of_data(places: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(3, SIZE)
    for t in range(SIZE):
        x = torch.where(places == t, net(x), x)
    return x


def by_an_index_of_data(places: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(3, SIZE)
    for t in range(SIZE):
        x = x.index_copy(1, places[t : t + 1], net(x)[:, t : t + 1])
    return x


def by_arithmetic(places: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(3, SIZE)
    for t in range(SIZE):
        here = (places == t).float()
        x = x * (1 - here) + net(x) * here
    return x


def by_moving(places: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(3, SIZE)
    for t in range(SIZE):
        x = torch.cat([x[:, 1:], torch.tanh(net(x).sum(1, keepdim=True)) + places[t]], 1)
    return x


@pytest.mark.parametrize(("run", "text"), [
    (by_a_mask_of_data, "not collapsed: aten.where.self at"),
    (by_an_index_of_data, "not collapsed: aten.index_copy.default at"),
    (by_arithmetic, "blends old and new values"),
    (by_moving, "moves what is carried to other places"),
])  # fmt: skip
def test_the_plan_says_why(run: Callable[[torch.Tensor], torch.Tensor], text: str) -> None:
    compiled = fxjacobi.compile(torch.no_grad()(run), measure=False)
    for seed in range(2):
        places = torch.randperm(SIZE, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            assert torch.equal(compiled(places), run(places))
    assert any(text in block.reason and "test_unplaced_writes.py" in block.reason for block in compiled.plan.blocks)


@pytest.mark.parametrize("cell", [nn.GRUCell(4, 4), nn.LSTMCell(4, 4), nn.RNNCell(4, 4)])
def test_a_recurrent_network_is_no_array(cell: nn.Module) -> None:
    def run(inputs: torch.Tensor) -> torch.Tensor:
        state = cell(inputs[0])
        for one in inputs:
            state = cell(one, state)
        return state if isinstance(state, torch.Tensor) else state[0]

    compiled = fxjacobi.compile(torch.no_grad()(run), measure=False)
    with torch.no_grad():
        inputs = torch.randn(SIZE, 3, 4)
        assert torch.equal(compiled(inputs), run(inputs))
    assert not any("not collapsed" in block.reason for block in compiled.plan.blocks)


def test_an_output_is_blamed_on_what_it_rests_on() -> None:
    def run(start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = h = start
        for t in range(SIZE):
            h = net(x)
            x = x.clone()
            x[:, t] = torch.tanh(h[:, t]) * torch.sigmoid(x[:, t]) + t
        return x, h

    compiled = fxjacobi.compile(torch.no_grad()(run), measure=False)
    with torch.no_grad():
        compiled(torch.zeros(3, SIZE))
    reasons = " ".join(block.reason for block in compiled.plan.blocks)
    assert "an output of the loop (mm_default), computed at step 0" in reasons
    assert "through aten.mm.default" in reasons


def test_operations_are_named_and_indices_told_from_values() -> None:
    def run(start: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        x = start.clone()
        for t in range(SIZE):
            x[:, t] = torch.tanh(net(x).index_select(1, order[t : t + 1])[:, 0])
        return x

    compiled = fxjacobi.compile(torch.no_grad()(run), measure=False)
    with torch.no_grad():
        compiled(torch.zeros(3, SIZE), torch.arange(SIZE))
    reasons = " ".join(block.reason for block in compiled.plan.blocks)
    assert "which selects by" in reasons
    assert "<function" not in reasons
    assert "another value at each step" not in reasons
