"""Dynamic programming over a table, written as two nested loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

import fxjacobi
from fxjacobi.loops import Kind, Loop
from fxjacobi.testing.assertions import assert_equal_bits

if TYPE_CHECKING:
    from collections.abc import Callable


def edit_distance(a: Tensor, b: Tensor) -> Tensor:
    """Levenshtein's, each cell from the three cells before it."""
    n, m = len(a), len(b)
    d = torch.zeros(n + 1, m + 1)
    d[:, 0] = torch.arange(n + 1)
    d[0] = torch.arange(m + 1)
    for i in range(1, n + 1):
        for j in range(1, m + 1):
            changed = (a[i - 1] != b[j - 1]).float()
            d[i, j] = torch.minimum(torch.minimum(d[i - 1, j] + 1, d[i, j - 1] + 1), d[i - 1, j - 1] + changed)
    return d[n, m]


def best_path(a: Tensor, b: Tensor) -> Tensor:
    """The cost of the cheapest path through a grid, its first row and column summed before."""
    cost = (a[:, None] - b).abs().float()
    d = torch.zeros_like(cost)
    d[0], d[:, 0] = cost[0].cumsum(0), cost[:, 0].cumsum(0)
    for i in range(1, len(a)):
        for j in range(1, len(b)):
            d[i, j] = cost[i, j] + torch.minimum(d[i - 1, j], d[i, j - 1])
    return d[-1, -1]


def deepest(loop: Loop) -> int:
    inner = [m for m in loop.body.children() if isinstance(m, Loop)]
    return 1 + max(map(deepest, inner), default=0)


@pytest.mark.parametrize("size", [(14, 10), (9, 13), (11, 11)])
@pytest.mark.parametrize("run", [edit_distance, best_path])
@pytest.mark.parametrize("rtol", [0.0, 1e-5])
def test_rows_of_cells_are_a_loop_of_loops(
    run: Callable[[Tensor, Tensor], Tensor], size: tuple[int, int], rtol: float
) -> None:
    """Each cell is read where it was computed, however long its row and its column are by then."""
    torch.manual_seed(0)

    def words() -> tuple[Tensor, Tensor]:
        return torch.randint(0, 4, (size[0],)), torch.randint(0, 4, (size[1],))

    compiled = fxjacobi.compile(run, rtol=rtol, measure=False)
    for _ in range(2):
        a, b = words()
        assert_equal_bits(compiled(a, b), run(a, b))
    rolled = [m for m in compiled.stages["roll_loops"].children() if isinstance(m, Loop)]
    outer = max(rolled, key=lambda loop: loop.trip_count * deepest(loop))
    assert deepest(outer) == 2
    assert outer.trip_count >= size[0] - 2
    steps = [b for b in compiled.plan.blocks if b.kind is Kind.RECURRENCE]
    assert max(steps, key=lambda block: block.operations).method == "scripted"
