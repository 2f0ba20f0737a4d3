"""Writes through constant masks and indices become writes in place; all others stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fxjacobi import ops
from fxjacobi.capture import capture
from fxjacobi.passes.places_to_writes import PlacesToWrites

if TYPE_CHECKING:
    from collections.abc import Callable

ROWS, COLUMNS = 3, 6


def _mask(*places: int) -> torch.Tensor:
    return (torch.arange(COLUMNS)[:, None] == torch.tensor(places)).any(1)


def _index_put(x: torch.Tensor, index: tuple[Any, ...], value: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[index] = value
    return y


WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mask of a column": lambda x, v: torch.where(torch.arange(COLUMNS) == 2, v, x),
    "mask of the rest": lambda x, v: torch.where(torch.arange(COLUMNS) != 2, x, v),
    "mask of every other column": lambda x, v: torch.where(_mask(1, 3, 5), v, x),
    "mask of an element": lambda x, v: torch.where(
        (torch.arange(COLUMNS) == 4) & (torch.arange(ROWS)[:, None] == 1), v, x
    ),
    "mask and one value a row": lambda x, v: torch.where(torch.arange(COLUMNS) == 2, v[:, :1], x),
    "scatter": lambda x, v: x.scatter(1, torch.full((ROWS, 1), 3), v[:, :1]),
    "index_copy": lambda x, v: x.index_copy(1, torch.tensor([4]), v[:, :1]),
    "index_copy of a range": lambda x, v: x.index_copy(1, torch.tensor([1, 2]), v[:, :2]),
    "index_put of a column": lambda x, v: _index_put(x, (slice(None), torch.tensor([2])), v[:, :1]),
    "index_put of rows and a column": lambda x, v: _index_put(x, (torch.arange(ROWS), torch.full((ROWS,), 5)), v[:, 0]),
    "cat of a column between two parts": lambda x, v: torch.cat([x[:, :2], v[:, :1], x[:, 3:]], 1),
    "cat of the first columns": lambda x, v: torch.cat([v[:, :2], x[:, 2:]], 1),
    "cat of the last row": lambda x, v: torch.cat([x[:2], v[:1]]),
    "cat after a single column": lambda x, v: torch.cat([x[:, :1], v[:, :5]], 1),
}

KEPT: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cat of parts that move": lambda x, v: torch.cat([x[:, 1:3], v[:, :1], x[:, 3:]], 1),
    "cat of parts of two": lambda x, v: torch.cat([x[:, :2], v[:, 2:3] * 2, v[:, 3:]], 1),
    "a mask of data": lambda x, v: torch.where(x > 0, v, x),
    "an index of data": lambda x, v: x.scatter(1, v[:, :1].abs().long() % COLUMNS, v[:, :1]),
    "no box": lambda x, v: torch.where(_mask(0, 1, 4), v, x),
    "all of it": lambda x, v: torch.where(torch.arange(COLUMNS) >= 0, v, x),
    "nothing": lambda x, v: torch.where(torch.arange(COLUMNS) < 0, v, x),
    "another order": lambda x, v: x.index_copy(1, torch.tensor([2, 1]), v[:, :2]),
    "twice": lambda x, v: _index_put(x, (slice(None), torch.tensor([2, 2])), v[:, :1].expand(-1, 2)),
    "another dtype": lambda x, v: torch.where(torch.arange(COLUMNS) == 2, v.double(), x),
    "accumulated": lambda x, v: x.index_put((torch.tensor([1]),), v[:1], accumulate=True),
}


def _applied(function: Callable[..., torch.Tensor]) -> tuple[Any, bool, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, v = torch.randn(ROWS, COLUMNS), torch.randn(ROWS, COLUMNS)
    x[0, 0], v[1, 2] = float("nan"), -0.0
    module = capture(function, (x, v), {}).graph_module
    result = PlacesToWrites().run(module)
    (found,) = result.module(x, v)
    return result.module, result.modified, found, function(x, v)


@pytest.mark.parametrize("name", WRITES)
def test_a_constant_place_is_written(name: str) -> None:
    module, modified, found, wanted = _applied(WRITES[name])
    assert modified
    assert any(node.target is ops.write for node in module.graph.nodes)
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))
    assert found.stride() == wanted.stride()


@pytest.mark.parametrize("name", KEPT)
def test_what_is_no_constant_place_stays(name: str) -> None:
    _, modified, found, wanted = _applied(KEPT[name])
    assert not modified
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())


def test_a_buffer_is_no_constant() -> None:
    net = torch.nn.Module()
    net.place = torch.nn.Buffer(torch.tensor([1]))
    module = capture(lambda x: x.index_copy(1, net.place, x[:, :1]), (torch.randn(ROWS, COLUMNS),), {}).graph_module
    assert not PlacesToWrites().run(module).modified
