"""``scan`` against the plain loop, with pytrees, backwards, and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxjacobi
from fxjacobi.scan import scan


def accumulate(carry: dict[str, torch.Tensor], x: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, Any]:
    total = carry["total"] * 0.5 + x[0] - x[1]
    return {"total": total, "count": carry["count"] + 1}, (total * 2, {"x": x[0]}, None)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_is_the_loop(reverse: bool) -> None:
    xs = (torch.randn(7, 3), torch.randn(7, 3))
    init = {"total": torch.zeros(3), "count": torch.tensor(0)}
    carry, (doubled, inputs, nothing) = scan(accumulate, init, xs, reverse=reverse)
    total = torch.zeros(3)
    wanted: list[torch.Tensor] = []
    for t in reversed(range(7)) if reverse else range(7):
        total = total * 0.5 + xs[0][t] - xs[1][t]
        wanted.append(total * 2)
    assert torch.equal(doubled, torch.stack(wanted[::-1] if reverse else wanted))
    assert torch.equal(carry["total"], total)
    assert carry["count"] == 7
    assert torch.equal(inputs["x"], xs[0])
    assert nothing is None


def test_scan_without_inputs_takes_a_length() -> None:
    carry, ys = scan(lambda c, _: (c * 2, c), torch.ones(1), None, length=5)
    assert carry.item() == 32
    assert ys.flatten().tolist() == [1, 2, 4, 8, 16]


def test_gradients_flow_through_scan() -> None:
    start = torch.ones(2, requires_grad=True)
    carry, _ = scan(lambda c, x: (c * x, None), start, torch.tensor([[2.0], [3.0]]))
    carry.sum().backward()
    assert start.grad is not None
    assert start.grad.tolist() == [6, 6]


@pytest.mark.parametrize(
    ("step", "xs", "length", "message"),
    [
        (lambda c, x: (c, x), (torch.ones(3), torch.ones(4)), None, "one length"),
        (lambda c, x: (c, x), torch.ones(3), 4, "one length"),
        (lambda c, x: (c, x), None, None, "one length"),
        (lambda c, x: (c, x), torch.ones(0, 2), None, "at least one step"),
        (lambda c, x: (c, x), torch.tensor(1.0), None, "no dimension"),
        (lambda c, x: ((c, c), x), torch.ones(3), None, "structure of the carry"),
        (lambda c, x: (c.double(), x), torch.ones(3), None, "changed a leaf"),
        (lambda c, x: (c.expand(2, 1), x), torch.ones(3), None, "changed a leaf"),
        (lambda c, x: (c, x if x < 1.5 else (x, x)), torch.tensor([1.0, 2.0]), None, "structure of y"),
    ],
)
def test_scan_refuses(step: Any, xs: Any, length: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scan(step, torch.ones(1), xs, length)


def test_scan_refuses_other_types() -> None:
    with pytest.raises(TypeError, match="leaves must be tensors"):
        scan(lambda c, x: (c, x), torch.ones(1), [1, 2])
    with pytest.raises(TypeError, match="pair"):
        scan(lambda c, x: c, torch.ones(1), torch.ones(2))


def test_a_carry_may_hold_none() -> None:
    def mapped(xs: torch.Tensor) -> Any:
        return scan(lambda carry, x: (carry, 2 * x), None, xs)

    def half(xs: torch.Tensor) -> Any:
        return scan(lambda c, x: ((torch.tanh(c[0] + x), None), c[0]), (torch.zeros(4), None), xs)

    def last(xs: torch.Tensor) -> Any:
        (state, nothing), _ = scan(lambda c, x: ((c[0] + x, None), None), (torch.zeros(4), None), xs)
        return state, nothing

    xs = torch.randn(40, 4)
    for model in (mapped, half, last):
        compiled = fxjacobi.compile(model, measure=False, strict=True)
        for _ in range(2):
            found, wanted = compiled(xs), model(xs)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert compiled.report.solved
