"""Lists of columns that are put together at each step become writes into one array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fxjacobi import ops
from fxjacobi.bits import first_difference
from fxjacobi.capture import capture
from fxjacobi.passes.canonicalize import Canonicalize
from fxjacobi.passes.collapse_sampling import CollapseSampling
from fxjacobi.passes.eliminate import Eliminate
from fxjacobi.passes.hoist_random import HoistRandom
from fxjacobi.passes.prefixes_to_writes import PrefixesToWrites
from fxjacobi.passes.roll_loops import RollLoops
from fxjacobi.passes.split_components import SplitComponents
from fxjacobi.sampling import JacobiWrites
from tests.unit.sampling_models import Attention, made

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

SIZE = 10


def column(net: nn.Module, x: torch.Tensor, t: int) -> torch.Tensor:
    mean, scale = net(x).chunk(2, -1)
    value: torch.Tensor = mean[:, t] + scale[:, t].exp() * torch.randn(len(x))
    return value


def stacked(net: nn.Module) -> torch.Tensor:
    columns: list[torch.Tensor] = []
    for t in range(SIZE):
        prefix = torch.stack(columns, 1) if columns else torch.zeros(3, 0)
        columns.append(column(net, torch.cat([prefix, torch.zeros(3, SIZE - t)], 1), t))
    return torch.stack(columns, 1)


def concatenated(net: nn.Module) -> torch.Tensor:
    columns: list[torch.Tensor] = []
    for t in range(SIZE):
        columns.append(column(net, torch.cat([*columns, torch.full((3, SIZE - t), 0.5)], 1), t)[:, None])
    return torch.cat(columns, 1)


def tokens(net: nn.Module) -> torch.Tensor:
    chosen: list[torch.Tensor] = []
    for t in range(SIZE):
        prefix = torch.stack(chosen, 1) if chosen else torch.zeros(3, 0, dtype=torch.long)
        x = torch.cat([prefix, torch.zeros(3, SIZE - t, dtype=torch.long)], 1)
        chosen.append(torch.multinomial(net(x)[:, t].softmax(-1), 1)[:, 0])
    return torch.stack(chosen, 1)


def filled(net: nn.Module) -> torch.Tensor:
    columns: list[torch.Tensor] = []
    for t in range(SIZE):
        columns.append(column(net, torch.stack(columns + [torch.full((3,), 0.5)] * (SIZE - t), 1), t))
    return torch.stack(columns, 1)


def padded(net: nn.Module) -> torch.Tensor:
    x = torch.zeros(3, 0)
    for t in range(SIZE):
        x = torch.cat([x, column(net, functional.pad(x, (0, SIZE - t), value=0.5), t)[:, None]], 1)
    return x


def before(function: Callable[..., Any], *args: Any) -> fx.GraphModule:
    module = capture(function, args, {}).graph_module
    for each in (Canonicalize(gradients=False), HoistRandom(), Eliminate()):
        module = each.run(module).module
    return module


@pytest.mark.parametrize(
    ("function", "net"),
    [
        (stacked, made(SIZE, 32)),
        (concatenated, made(SIZE, 32)),
        (filled, made(SIZE, 32)),
        (padded, made(SIZE, 32)),
        (tokens, Attention(length=SIZE)),
    ],
    ids=["stacked", "concatenated", "filled", "padded", "tokens"],
)
def test_the_sample_is_the_same_and_comes_from_sweeps(function: Callable[..., Any], net: nn.Module) -> None:
    with torch.no_grad():
        rewritten = PrefixesToWrites().run(before(function, net))
        assert rewritten.modified
        module = rewritten.module
        for each in (RollLoops(), SplitComponents(), CollapseSampling()):
            module = each.run(module).module
        assert [child for child in module.children() if isinstance(child, JacobiWrites)]
        for graph_module in (rewritten.module, module):
            torch.manual_seed(4)
            wanted = function(net)
            torch.manual_seed(4)
            (found,) = graph_module()
            assert first_difference(found, wanted) is None


def test_one_concatenation_is_left_alone() -> None:
    def once(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.stack([x[:, 0]], 1), torch.zeros(3, 2)], 1)

    assert not PrefixesToWrites().run(before(once, torch.randn(3, 4))).modified


def test_another_filler_starts_another_chain() -> None:
    def two(x: torch.Tensor) -> torch.Tensor:
        a = torch.cat([torch.stack([x[:, 0]], 1), torch.zeros(3, 2)], 1)
        b = torch.cat([torch.stack([x[:, 0], x[:, 1]], 1), torch.ones(3, 1)], 1)
        return a + b

    assert not PrefixesToWrites().run(before(two, torch.randn(3, 4))).modified


def test_another_order_is_no_prefix() -> None:
    def swapped(x: torch.Tensor) -> torch.Tensor:
        a = torch.cat([torch.stack([x[:, 0]], 1), torch.zeros(3, 2)], 1)
        b = torch.cat([torch.stack([x[:, 1], x[:, 0]], 1), torch.zeros(3, 1)], 1)
        return a + b

    assert not PrefixesToWrites().run(before(swapped, torch.randn(3, 4))).modified


def test_a_growing_chain_is_rewritten_with_the_same_values() -> None:
    def grows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a = torch.cat([torch.stack([x[:, 0]], 1), torch.zeros(3, 2)], 1)
        b = torch.cat([torch.stack([x[:, 0], x[:, 1]], 1), torch.zeros(3, 1)], 1)
        return a, b, torch.stack([x[:, 0], x[:, 1], x[:, 2]], 1)

    x = torch.randn(3, 4)
    module = PrefixesToWrites().run(before(grows, x)).module
    assert sum(node.target is ops.write for node in module.graph.nodes) == 3
    for found, wanted in zip(module(x), grows(x), strict=True):
        assert first_difference(found, wanted) is None
