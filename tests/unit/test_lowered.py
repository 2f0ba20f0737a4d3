"""A function beneath torch.func's transforms, as a graph that computes the same bits."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import torch

from fxjacobi.graph import TensorSpec
from fxjacobi.lowered import lowered


def test_vmap_becomes_plain_calls() -> None:
    weight = torch.randn(3, 4)

    def step(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        low, high = torch.aminmax(x)
        return torch.tanh(weight @ x) + y[:3], high - low

    mapped = torch.func.vmap(step, (0, None))
    x, y = torch.randn(5, 4), torch.randn(4)
    with torch.no_grad():
        graph = lowered(mapped, x, y)
        other = torch.randn(5, 4), torch.randn(4)
        for found, wanted in zip(graph(*other), mapped(*other), strict=True):
            assert torch.equal(found, wanted)
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    assert [n.meta["spec"] for n in placeholders] == [
        TensorSpec((5, 4), torch.float32, torch.device("cpu"), (4, 1)),
        TensorSpec((4,), torch.float32, torch.device("cpu"), (1,)),
    ]
    assert any(n.op == "get_attr" for n in graph.graph.nodes), "the weight is brought along"


def test_vjp_becomes_plain_calls() -> None:
    def products(x: torch.Tensor, cotangent: torch.Tensor, scale: float) -> Any:
        return torch.func.vjp(lambda v: torch.sigmoid(v) * scale, x)[1](cotangent)

    x, g = torch.randn(6), torch.randn(6)
    graph = lowered(products, x, g, 2.0)
    other = torch.randn(6), torch.randn(6)
    assert torch.equal(graph(*other, 2.0)[0], products(*other, 2.0)[0])
    assert all("grad" not in str(n.target) for n in graph.graph.nodes)


def test_an_argument_that_is_returned_and_one_that_is_not_read() -> None:
    graph = lowered(lambda a, b: (a, a + 1), torch.zeros(2), torch.zeros(3))
    first, second = graph(torch.ones(2), torch.ones(3))
    assert torch.equal(first, torch.ones(2))
    assert torch.equal(second, torch.full((2,), 2.0))


def test_it_does_not_import_the_compiler() -> None:
    program = (
        "import sys, torch\nfrom fxjacobi.lowered import lowered\n"
        "lowered(torch.func.vmap(torch.sin), torch.zeros(2, 3))\n"
        "sys.exit('torch._inductor' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_tensor_given_twice_is_two_placeholders() -> None:
    x = torch.randn(3)
    graph = lowered(lambda a, b, c: a - 2 * b + 3 * c, x, x, x)
    a, b, c = torch.randn(3, 3)
    torch.testing.assert_close(graph(a, b, c), a - 2 * b + 3 * c)
