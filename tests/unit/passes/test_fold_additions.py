"""What is added to a product of the state starts it; nothing else changes, and never in the exact contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import fxjacobi
from fxjacobi.loops import Carried, Invariant, Loop, Scanned, Stacked
from fxjacobi.passes.fold_additions import FoldAdditions
from tests.unit.loop_makers import graph_of, make_loop

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten


def body_of(body: Callable[..., tuple[Any, ...]]) -> tuple[Loop, list[torch.Tensor]]:
    torch.manual_seed(0)
    shapes = [(9, 3, 5), (3, 4), (5, 4), (4, 4), (4,), (4,), (3, 4)]
    operands = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    invariants = [Invariant(i) for i in range(2, 7)]
    bindings = [Scanned(0, 0, range(9)), Carried(0, 1, (1,)), *invariants]
    return make_loop(body, 9, bindings, [Stacked(0)], operands), operands


def elman(x: Any, h: Any, w: Any, r: Any, b: Any, c: Any, d: Any) -> tuple[Any]:
    return (aten.tanh.default(aten.add.Tensor(aten.addmm.default(b, x, w), aten.addmm.default(c, h, r))),)


def without_biases(x: Any, h: Any, w: Any, r: Any, b: Any, c: Any, d: Any) -> tuple[Any]:
    return (aten.tanh.default(aten.add.Tensor(aten.mm.default(h, r), aten.mm.default(x, w))),)


def one_bias(x: Any, h: Any, w: Any, r: Any, b: Any, c: Any, d: Any) -> tuple[Any]:
    return (aten.tanh.default(aten.add.Tensor(aten.addmm.default(c, h, r), aten.mm.default(x, w))),)


def folded(loop: Loop, operands: list[torch.Tensor], *, exact: bool = False) -> Loop:
    module = FoldAdditions(exact=exact).run(graph_of(loop, operands)).module
    (found,) = (m for m in module.modules() if isinstance(m, Loop))
    return found


def count(loop: Loop, target: Any) -> int:
    return sum(node.target is target for node in loop.body.graph.nodes)


@pytest.mark.parametrize("body", [elman, without_biases, one_bias])
def test_a_sum_of_two_products_becomes_one_product(body: Callable[..., tuple[Any, ...]]) -> None:
    loop, operands = body_of(body)
    after = folded(loop, operands)
    assert count(after, aten.add.Tensor) == (1 if body is elman else 0)  # that of the biases
    state = [n for n in after.body.graph.nodes if n.op == "placeholder"][1]
    (recurrent,) = state.users
    assert recurrent.target is aten.addmm.default
    torch.testing.assert_close(after(*operands)[0], loop(*operands)[0], rtol=1e-13, atol=1e-14)


def test_bits_count_in_the_exact_contract() -> None:
    loop, operands = body_of(elman)
    assert folded(loop, operands, exact=True) is loop


def both_read_the_state(x: Any, h: Any, w: Any, r: Any, b: Any, c: Any, d: Any) -> tuple[Any]:
    return (aten.tanh.default(aten.add.Tensor(aten.mm.default(h, r), aten.addmm.default(b, h, r))),)


def read_twice(x: Any, h: Any, w: Any, r: Any, b: Any, c: Any, d: Any) -> tuple[Any]:
    product = aten.mm.default(h, r)
    return (aten.tanh.default(aten.mul.Tensor(product, aten.add.Tensor(product, aten.mm.default(x, w)))),)


def scaled(x: Any, h: Any, w: Any, r: Any, b: Any, c: Any, d: Any) -> tuple[Any]:
    return (aten.tanh.default(aten.add.Tensor(aten.mm.default(h, r), aten.mm.default(x, w), alpha=2.0)),)


def biases_of_two_shapes(x: Any, h: Any, w: Any, r: Any, b: Any, c: Any, d: Any) -> tuple[Any]:
    return (aten.tanh.default(aten.add.Tensor(aten.addmm.default(d, x, w), aten.addmm.default(c, h, r))),)


def a_bias_that_reads_the_state(x: Any, h: Any, w: Any, r: Any, b: Any, c: Any, d: Any) -> tuple[Any]:
    start = aten.mul.Tensor(h, 0.5)
    return (aten.tanh.default(aten.add.Tensor(aten.addmm.default(b, x, w), aten.addmm.default(start, h, r))),)


@pytest.mark.parametrize(
    "body", [both_read_the_state, read_twice, scaled, biases_of_two_shapes, a_bias_that_reads_the_state]
)
def test_what_would_change_or_gain_nothing_stays(body: Callable[..., tuple[Any, ...]]) -> None:
    loop, operands = body_of(body)
    assert folded(loop, operands) is loop


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell])
def test_gradients_reach_both_biases(kind: type[nn.RNNCell | nn.LSTMCell]) -> None:
    torch.manual_seed(0)
    cell = kind(3, 4).double()

    def run(xs: torch.Tensor) -> torch.Tensor:
        state, rows = None, []
        for x in xs:
            state = cell(x, state)
            rows.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(rows)

    xs = torch.randn(12, 2, 3, dtype=torch.float64)
    compiled = fxjacobi.compile(run, rtol=1e-10, measure=False)
    compiled(xs)
    found = compiled(xs)
    wanted = run(xs)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(found.sum(), list(cell.parameters())),
        torch.autograd.grad(wanted.sum(), list(cell.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    assert compiled.report.solved
