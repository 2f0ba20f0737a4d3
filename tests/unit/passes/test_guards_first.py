"""Guards on what is given move to the front; guards on what is computed or drawn stay behind it."""

from __future__ import annotations

import pytest
import torch

from fxjacobi import ops
from fxjacobi.capture import capture
from fxjacobi.errors import GuardFailed
from fxjacobi.passes.guards_first import GuardsFirst


def skipping(known: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    for t in range(4):
        if known[t]:
            continue
        x = x.sin()
        if x.sum() > 100:
            x = x + 1
    return x


def test_guards_on_inputs_are_checked_before_anything_is_computed() -> None:
    known, x = torch.tensor([True, False, True, False]), torch.randn(3)
    module = capture(skipping, (known, x), {}).graph_module
    result = GuardsFirst().run(module)
    assert result.modified
    nodes = [node for node in result.module.graph.nodes if node.op == "call_function"]
    guards = [place for place, node in enumerate(nodes) if node.target in ops.GUARDS]
    first_sine = next(place for place, node in enumerate(nodes) if node.target is torch.ops.aten.sin.default)
    assert sum(place < first_sine for place in guards) == 4
    assert sum(place > first_sine for place in guards) == 2
    assert torch.equal(result.module(known, x)[0], skipping(known, x))
    with pytest.raises(GuardFailed):
        result.module(~known, x)
    assert not GuardsFirst().run(result.module).modified


def test_what_serves_something_else_too_stays() -> None:
    def both(x: torch.Tensor) -> torch.Tensor:
        y = x.cos()
        z = y.sin()
        return z + 1 if y[0] > -2 else z

    module = capture(both, (torch.randn(3),), {}).graph_module
    assert not GuardsFirst().run(module).modified


def test_a_guard_on_a_draw_stays() -> None:
    def drawn(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        return y if torch.rand(1) < 2 else x

    module = capture(drawn, (torch.randn(3),), {}).graph_module
    assert not GuardsFirst().run(module).modified
