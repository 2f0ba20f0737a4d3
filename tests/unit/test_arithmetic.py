"""What was measured under one setting of the arithmetic is not used under another."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

import fxjacobi
from fxjacobi.arithmetic import arithmetic_state
from fxjacobi.signature import signature

if TYPE_CHECKING:
    from collections.abc import Iterator

MKLDNN: Any = torch.backends.mkldnn  # its parts are made at run time


@pytest.fixture
def settings() -> Iterator[None]:
    """Put the settings back after a test."""
    precision = MKLDNN.matmul.fp32_precision
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    MKLDNN.matmul.fp32_precision = precision
    torch.use_deterministic_algorithms(deterministic)


def test_settings_are_part_of_the_signature(settings: None) -> None:
    x = torch.ones(2)
    seen = {signature((x,), {})[0]}
    torch.use_deterministic_algorithms(True)
    seen.add(signature((x,), {})[0])
    MKLDNN.matmul.fp32_precision = "bf16"  # the newer settings: the older getters now raise
    seen.add(signature((x,), {})[0])
    assert len(seen) == 3
    assert hash(arithmetic_state()) == hash(arithmetic_state())


def test_a_changed_setting_means_a_new_specialisation(settings: None) -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            x = torch.tanh(x @ x)
        return x

    compiled = fxjacobi.compile(model, measure=False)
    x = torch.rand(4, 4)
    with warnings.catch_warnings():
        compiled(x)
        compiled(x)
        assert len(compiled._specialisations) == 1
        torch.use_deterministic_algorithms(True)
        assert torch.equal(compiled(x), model(x))
        assert len(compiled._specialisations) == 2
