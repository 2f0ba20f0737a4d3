"""one_hot is recorded with one branch that holds for all classes in range."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import fxjacobi


def encode(x: torch.Tensor, classes: int) -> torch.Tensor:
    return functional.one_hot(x, classes)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_other_classes_take_the_same_path(shape: tuple[int, ...]) -> None:
    compiled = fxjacobi.compile(encode, measure=False)
    for seed in range(5):
        x = torch.randint(0, 7, shape, generator=torch.Generator().manual_seed(seed))
        found, wanted = compiled(x, 7), encode(x, 7)
        assert torch.equal(found, wanted)
        assert found.dtype == wanted.dtype
        assert seed == 0 or compiled.report.solved, compiled.report.reason


@pytest.mark.parametrize("wrong", [-1, 7])
def test_classes_out_of_range_raise_as_ever(wrong: int) -> None:
    compiled = fxjacobi.compile(encode, measure=False)
    with pytest.raises(RuntimeError, match="Class values"):
        compiled(torch.tensor([0, wrong]), 7)
    good = fxjacobi.compile(encode, measure=False)
    good(torch.tensor([0, 1]), 7)
    with pytest.raises(RuntimeError, match="Class values"):
        good(torch.tensor([0, wrong]), 7)


def test_a_number_of_classes_from_the_data_stays_a_branch_on_it() -> None:
    def open_ended(x: torch.Tensor) -> torch.Tensor:
        return functional.one_hot(x)

    compiled = fxjacobi.compile(open_ended, measure=False)
    for top in (3, 5):
        x = torch.tensor([0, top])
        assert torch.equal(compiled(x), functional.one_hot(x))


def test_the_original_is_back_afterwards() -> None:
    original = functional.one_hot
    fxjacobi.compile(encode, measure=False)(torch.tensor([1]), 3)
    assert functional.one_hot is original
