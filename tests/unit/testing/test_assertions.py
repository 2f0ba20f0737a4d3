"""The assertions accept what is equal and, planted violation by planted violation, nothing else."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from fxjacobi.testing import assert_equal_bits, assert_equivalent

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: object


def structure() -> dict[str, Any]:
    return {"a": (torch.ones(2), None), "b": [Pair(torch.tensor([float("nan"), -0.0]), "text")], "n": float("nan")}


def test_equal_structures_pass() -> None:
    assert_equal_bits(structure(), structure())
    assert_equal_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def set_leaf(value: dict[str, Any]) -> None:
    value["a"][0][1] = 1.0 + 2**-23


def set_text(value: dict[str, Any]) -> None:
    value["b"][0].right = "other"


def set_container(value: dict[str, Any]) -> None:
    value["a"] = list(value["a"])


def set_length(value: dict[str, Any]) -> None:
    value["b"].append(1)


def set_order(value: dict[str, Any]) -> None:
    value["a"] = value.pop("a")


def set_grad(value: dict[str, Any]) -> None:
    value["a"][0].requires_grad_()


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (set_leaf, r"output\['a'\]\[0\].*1 of 2 elements differ, first at \[1\].*1 ULP"),
        (set_text, r"output\['b'\]\[0\]\.right: is 'other', expected 'text'"),
        (set_container, r"output\['a'\]: is a list, expected a tuple"),
        (set_length, r"output\['b'\]: has 2 items, expected 1"),
        (set_order, r"has the keys"),
        (set_grad, r"output\['a'\]\[0\]: requires_grad is True"),
    ],
)
def test_a_planted_difference_is_named(plant: Callable[[dict[str, Any]], None], message: str) -> None:
    got = structure()
    plant(got)
    with pytest.raises(AssertionError, match=message):
        assert_equal_bits(got, structure())


def test_the_block_is_named() -> None:
    with pytest.raises(AssertionError, match=r"block jacobi_1"):
        assert_equal_bits(torch.ones(1), torch.zeros(1), block="jacobi_1")


class Counting(nn.Module):
    """Draws, counts in a buffer and in an attribute, and writes to its argument."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.last: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x) + torch.randn(3)
        x[0] = 7.0
        self.count += 1
        self.last = y.detach()
        return y


def arguments() -> tuple[torch.Tensor]:
    return (torch.ones(2, 3),)


def test_a_model_is_equivalent_to_itself_and_its_state_is_put_back_between_the_runs() -> None:
    model = Counting()
    for calls in range(1, 4):
        assert_equivalent(model, model, arguments, gradients=0.0)
        assert int(model.count) == calls


def no_draw(model: Counting, x: torch.Tensor) -> torch.Tensor:
    state = torch.get_rng_state()
    y: torch.Tensor = model(x)
    torch.set_rng_state(state)
    return y


def no_write(model: Counting, x: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(model(x.clone()))


def no_count(model: Counting, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = model(x)
    model.count -= 1
    return y


def no_memory(model: Counting, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = model(x)
    model.last = None
    return y


def other_parameters(model: Counting, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = model(x)
    with torch.no_grad():
        model.linear.bias[0] += 1
    return y


def other_rounding(model: Counting, x: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(model(x), torch.tensor(9.0))


def raises(model: Counting, x: torch.Tensor) -> torch.Tensor:
    raise ValueError("no")


def shares(model: Counting, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = model(x)
    return x.copy_(y)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (no_draw, "random state"),
        (no_write, r"arguments after the call\[0\]"),
        (no_count, r"state after the call\['count'\]"),
        (no_memory, r"state after the call\['last'\]"),
        (other_parameters, r"state after the call\['linear.bias'\]"),
        (other_rounding, r"output: .*6 of 6 elements differ.* ULP"),
        (raises, "raised ValueError"),
        (shares, "memory shared"),
    ],
)
def test_a_planted_violation_is_caught(broken: Callable[[Counting, torch.Tensor], torch.Tensor], message: str) -> None:
    model = Counting()
    with torch.no_grad(), pytest.raises(AssertionError, match=message):
        assert_equivalent(lambda x: broken(model, x), model, arguments)


def test_wrong_gradients_are_caught() -> None:
    model = nn.Linear(3, 3)
    assert_equivalent(model, model, arguments, gradients=0.0)
    with pytest.raises(AssertionError, match="Greatest absolute difference"):
        assert_equivalent(
            lambda x: model(x).detach() + 2 * (m := model(x)) - 2 * m.detach(), model, arguments, gradients=1e-6
        )


def test_equal_exceptions_are_equivalent_and_others_are_not() -> None:
    def bad(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("the user's own")

    def worse(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("another")

    assert_equivalent(bad, bad, arguments)
    with pytest.raises(AssertionError, match="another"):
        assert_equivalent(worse, bad, arguments)


def test_arguments_that_share_memory_still_share_it_in_both_runs() -> None:
    def overlapping() -> tuple[torch.Tensor, torch.Tensor]:
        base = torch.zeros(4)
        return base[:3], base[1:]

    def model(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(1)
        return b.sum()

    assert_equivalent(model, model, overlapping)
    with pytest.raises(AssertionError, match="output"):
        assert_equivalent(lambda a, b: model(a, b.clone()), model, overlapping)
