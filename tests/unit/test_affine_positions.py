"""Places that selections take at every step, at once: the same as walking the selections step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fxjacobi.affine_positions import affine_positions

aten = torch.ops.aten
SHAPE, STEPS = (3, 4, 5, 6), 4

graph = fx.Graph()
P, Q, R = (graph.placeholder(name) for name in "ijk")
LITERALS: dict[fx.Node, tuple[Any, ...]] = {P: (0, 3, -1, 2), Q: (1, 1, 4, 0), R: (3, 3, 6, 2)}

PATHS: dict[str, list[tuple[Any, tuple[Any, ...], dict[str, Any]]]] = {
    "nothing": [],
    "a column": [(aten.select.int, (1, P), {})],
    "two coordinates": [(aten.select.int, (2, Q), {}), (aten.select.int, (1, P), {})],
    "negative dimensions": [(aten.select.int, (-2, Q), {}), (aten.unsqueeze.default, (-1,), {})],
    "a slice of each": [(aten.slice.Tensor, (3, Q, R), {})],
    "a slice with steps": [(aten.slice.Tensor, (3, 1, None, 2), {}), (aten.select.int, (1, P), {})],
    "views between": [
        (aten.transpose.int, (1, 2), {}),
        (aten.select.int, (2, P), {}),
        (aten.permute.default, ([2, 0, 1],), {}),
        (aten.select.int, (2, Q), {}),
    ],
    "expanded": [
        (aten.select.int, (0, 1), {}),
        (aten.expand.default, ([2, 4, 5, 6],), {}),
        (aten.select.int, (1, P), {}),
    ],
}


def walked(path: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> torch.Tensor:
    rows = []
    for step in range(STEPS):
        part = torch.arange(3 * 4 * 5 * 6).reshape(SHAPE)
        for function, args, kwargs in path:
            part = function(part, *fx.map_arg(args, lambda node, step=step: LITERALS[node][step]), **kwargs)  # type: ignore[misc]
        rows.append(part)
    return torch.stack(rows)


@pytest.mark.parametrize("name", PATHS)
def test_the_same_places_as_step_by_step(name: str) -> None:
    indices = torch.arange(3 * 4 * 5 * 6).reshape(SHAPE)
    found = affine_positions(indices, PATHS[name], LITERALS, STEPS)
    assert found is not None
    assert torch.equal(found, walked(PATHS[name]))


def test_slices_that_move() -> None:
    indices = torch.arange(6).reshape(1, 6)
    moving: dict[fx.Node, tuple[Any, ...]] = {P: (0, 2, 4), Q: (2, 4, 6), R: (2, 5, 6)}
    found = affine_positions(indices, [(aten.slice.Tensor, (1, P, Q), {})], moving, 3)
    assert found is not None
    assert found.tolist() == [[[0, 1]], [[2, 3]], [[4, 5]]]
    # Of another length at each step: not of this kind.
    assert affine_positions(indices, [(aten.slice.Tensor, (1, P, R), {})], moving, 3) is None


@pytest.mark.parametrize(
    "path",
    [
        [(aten.index_select.default, (1, torch.tensor([0, 1])), {})],  # a copy
        [(aten.select.int, (P, 0), {})],  # along another dimension at each step
        [(aten.narrow.default, (1, P, 1), {})],
    ],
)
def test_other_moves_are_walked(path: list[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
    indices = torch.arange(3 * 4 * 5 * 6).reshape(SHAPE)
    assert affine_positions(indices, path, LITERALS, STEPS) is None


def test_places_out_of_range_are_left_to_the_walk() -> None:
    outside: dict[fx.Node, tuple[Any, ...]] = {P: (0, 4, 0, 0)}
    indices = torch.arange(3 * 4 * 5 * 6).reshape(SHAPE)
    assert affine_positions(indices, [(aten.select.int, (1, P), {})], outside, STEPS) is None
