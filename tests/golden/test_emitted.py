"""The emitted modules read as their plans: blocks in Gauss-Seidel order, named by kind, with little around them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.testing import FileCheck

import fxjacobi

if TYPE_CHECKING:
    from collections.abc import Callable


def _emitted(fn: Callable[..., Any], *args: Any) -> tuple[str, fxjacobi.SolvedModule]:
    compiled = fxjacobi.compile(fn, measure=False)
    with torch.no_grad():
        compiled(*args)
    return compiled.stages["emit_solvers"].code, compiled


def test_fixed_point() -> None:
    weight = torch.triu(torch.randn(8, 8), 1)

    def inverse(y: torch.Tensor) -> torch.Tensor:
        x = torch.zeros_like(y)
        for _ in range(8):
            x = y - torch.tanh(x @ weight)
        return x

    code, _ = _emitted(inverse, torch.randn(4, 8))
    FileCheck().check("def forward(self, input_0)").check("self.weight").check("aten.full.default").check_count(
        "self.fixed_point_0(", 1, exactly=True
    ).check("return (").run(code)
    FileCheck().check_not("loop_").check_not("aten.mm").run(code)


def test_projections_before_and_heads_after_a_recurrence() -> None:
    cell, head = nn.GRUCell(6, 8), nn.Linear(8, 3)

    def tag(xs: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(xs.shape[1], 8)
        out = []
        for t in range(xs.shape[0]):
            h = cell(xs[t], h)
            out.append(head(h).softmax(-1))
        return torch.stack(out)

    code, compiled = _emitted(tag, torch.randn(40, 8, 6))
    FileCheck().check("self.map_0(").check("self.recurrence_1(").check("self.map_2(").check("return (").run(code)
    before = compiled.stages["emit_solvers"].map_0
    assert isinstance(before, nn.Module)
    FileCheck().check_count("aten.addmm.default", 1, exactly=True).run(before.loop.body.code)  # type: ignore[union-attr, arg-type]


def test_sampling_is_one_jacobi_block() -> None:
    mask = torch.tril(torch.ones(12, 12), -1)
    weight = torch.randn(12, 12)

    def sample(n: int) -> torch.Tensor:
        x = torch.zeros(n, 12)
        for t in range(12):
            x[:, t] = torch.tanh(x @ (weight * mask).t())[:, t] + torch.rand(n)
        return x

    code, _ = _emitted(sample, 6)
    FileCheck().check_count("draw_each(torch.ops.aten.rand.default, 12, ", 1, exactly=True).check("self.jacobi_").check(
        "return ("
    ).run(code)


def test_straight_code_stays_straight() -> None:
    code, _ = _emitted(lambda x: (x * 2).relu().sum(-1), torch.randn(3, 4))
    FileCheck().check("aten.mul.Tensor(input_0, 2)").check("aten.relu").check("aten.sum.dim_IntList").run(code)
    FileCheck().check_not("self.").run(code.split("forward(self", 1)[1])
