"""Where tensors lie: arguments that start at no aligned address or leave gaps, and results in memory of their own.

The ordinary run's products round by the first, and the caller may write to one result and not to the others.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

import fxjacobi
from fxjacobi.placement import rounding_phase
from fxjacobi.testing import assert_equal_bits, assert_equivalent

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 5


class Models(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer, self.state, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 1)
        self.cells = nn.ModuleList(nn.RNNCell(width, width) for _ in range(3))

    def independent(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.head(x[t]) for t in range(STEPS)])

    def recurrent(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros_like(x[0])
        for t in range(STEPS):
            h = torch.tanh(self.layer(x[t]) + self.state(h))
        return h

    def after_a_write(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return self.recurrent(x)

    def after_a_write_through_a_view(self, x: torch.Tensor) -> torch.Tensor:
        x.transpose(0, 1)[:1].neg_()
        x[:1] = x[1:2]
        return self.recurrent(x)

    def after_a_copy(self, x: torch.Tensor) -> torch.Tensor:
        x.copy_(x.flip(0).transpose(0, 2).contiguous().transpose(0, 2))
        return self.recurrent(x) + torch.sigmoid(x).sum(0)

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        rows = x  # the first layer reads it where it lies, the others a new array
        for cell in self.cells:
            h, states = torch.zeros_like(x[0]), []
            for t in range(STEPS):
                h = cell(rows[t], h)
                states.append(h)
            rows = torch.stack(states)
        return rows

    def filled_in(self, x: torch.Tensor) -> torch.Tensor:
        for t in range(1, STEPS):
            x[t] = torch.tanh(self.layer(x[t - 1]))
        return x.sum()


def start_late(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


PLACES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "aligned": lambda x: x.clone(),
    "late": start_late,
    "late in its array": lambda x: torch.from_numpy(np.concatenate([np.zeros(1, "f4"), x.numpy().ravel()])[1:]).view(
        x.shape
    ),
    "every second": lambda x: x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x),
    "turned rows": lambda x: x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2),
    "turned": lambda x: x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1),
}

NAMES = [
    "independent",
    "recurrent",
    "after_a_write",
    "after_a_write_through_a_view",
    "after_a_copy",
    "layers",
    "filled_in",
]


@pytest.mark.parametrize(("batch", "width"), [(1, 9), (2, 9), (2, 12), (3, 16)])
@pytest.mark.parametrize("name", NAMES)
def test_a_call_equals_the_ordinary_one_wherever_its_argument_lies(name: str, batch: int, width: int) -> None:
    model = getattr(Models(width), name)
    compiled = fxjacobi.compile(model, measure=False)
    x = torch.randn(STEPS, batch, width)
    with torch.no_grad(), warnings.catch_warnings():
        if name == "filled_in":  # the solver of arrays keeps its own aligned array: checked, and then demoted
            warnings.simplefilter("ignore", fxjacobi.ExactnessWarning)
        else:
            warnings.simplefilter("error")
        for _ in range(2):
            for place in PLACES.values():
                assert_equal_bits(compiled(place(x)), model(place(x)))
                assert_equivalent(compiled, model, partial(lambda place: (place(x),), place))


def test_the_arguments_lie_as_their_names_say() -> None:
    x = torch.randn(STEPS, 3, 9)
    assert [rounding_phase(place(x)) for place in PLACES.values()] == [0, 4, 4, 0, 0, 0]


def test_products_of_late_arguments_round_otherwise() -> None:
    """The reason for all this: if it fails, the machine's products do not depend on addresses, and nothing is tested."""
    runs = [(Models(width).recurrent, torch.randn(STEPS, 2, width)) for width in (9, 12, 16)]
    with torch.no_grad():
        assert not all(torch.equal(model(x), model(start_late(x))) for model, x in runs)


def all_and_last(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    rows = [torch.tanh(x[t] * 2) for t in range(STEPS)]
    return torch.stack(rows), rows[-1], rows[0]


def all_twice(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    rows = [torch.tanh(x[t] * 2) for t in range(STEPS)]
    return torch.stack(rows), torch.stack([row.unsqueeze(0) for row in rows])


def as_they_came(x: torch.Tensor) -> torch.Tensor:
    rows = []
    for t in range(STEPS):
        row = x[t]
        if row.abs().sum() > 0:
            rows.append(row.unsqueeze(0))
    return torch.cat(rows)


def last_row_into_a_product(x: torch.Tensor) -> torch.Tensor:
    rows = [torch.tanh(x[t] * 2) for t in range(STEPS)]
    return rows[2] @ rows[3].t()


@pytest.mark.parametrize("fn", [all_and_last, all_twice, as_they_came, last_row_into_a_product])
@pytest.mark.parametrize("shape", [(2, 9), (3, 1)])
def test_the_results_of_a_batched_map_share_memory_as_the_ordinary_ones_do(
    fn: Callable[..., object], shape: tuple[int, ...]
) -> None:
    compiled = fxjacobi.compile(fn, measure=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            torch.manual_seed(seed)
            assert_equivalent(compiled, fn, lambda: (torch.rand(STEPS, *shape) + 0.1,))
    assert compiled.report.solved
