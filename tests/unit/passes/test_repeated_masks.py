"""A mask of zeros and ones is multiplied in once; what is no such mask, or not the same, is multiplied in again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import fxjacobi
from fxjacobi.capture import capture
from fxjacobi.passes.repeated_masks import RepeatedMasks
from fxjacobi.verify import equal

if TYPE_CHECKING:
    from torch import fx

aten = torch.ops.aten


class Masked(nn.Module):
    def __init__(self, mask: torch.Tensor, other: torch.Tensor | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, float("inf"), -0.0, float("nan"), -3.0]))
        self.mask = nn.Buffer(mask)
        self.other = nn.Buffer(mask.clone() if other is None else other)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for mask in (self.mask, self.other, self.mask, self.other):
            self.weight.data *= mask
            x = x + self.weight
        return x


def products(module: fx.GraphModule) -> int:
    return sum(node.target is aten.mul.Tensor for node in module.graph.nodes)


def recorded(net: nn.Module) -> fx.GraphModule:
    with torch.no_grad():
        return capture(net, (torch.zeros(5),), {}).graph_module


BINARY = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("mask", "other", "left"),
    [
        (BINARY, BINARY.flip(0), 2),
        (BINARY, None, 2),
        (BINARY, BINARY * 0.5, 4),
        (BINARY * 2, BINARY - 1, 4),
        (torch.tensor([1.0, -0.0, 1.0, 1.0, 0.0]), None, 4),
    ],
)
def test_only_masks_of_zeros_and_ones_are_taken_together(
    mask: torch.Tensor, other: torch.Tensor | None, left: int
) -> None:
    module = recorded(Masked(mask, other))
    result = RepeatedMasks().run(module)
    assert products(module) == 4
    assert products(result.module) == left
    assert result.modified is (left < 4)


def call_and_weight(net: Masked, x: torch.Tensor) -> Any:
    return net(x), net.weight.detach().clone()


def test_a_mask_that_changes_is_noticed() -> None:
    compiled = fxjacobi.compile(call_and_weight, measure=False)
    net, plain = Masked(BINARY, BINARY.flip(0)), Masked(BINARY, BINARY.flip(0))
    x = torch.randn(5)
    with torch.no_grad():
        for change in (1.0, 1.0, 0.5):
            for one in (net, plain):
                one.weight.fill_(3.0)
                one.mask.mul_(change)
            for a, b in zip(compiled(net, x), call_and_weight(plain, x), strict=True):
                assert equal(a, b)
    assert not compiled.report.solved
