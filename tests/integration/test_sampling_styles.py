"""Sampling loops in many users' styles: which are collapsed, why not the others, and that all samples are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fxjacobi
from fxjacobi.loops import Kind
from fxjacobi.verify import equal
from tests.integration import sampling_styles_images, sampling_styles_reals, sampling_styles_tokens
from tests.integration.sampling_style import STYLES

_TABLES = (sampling_styles_images, sampling_styles_reals, sampling_styles_tokens)


def _solved(name: str, **options: Any) -> fxjacobi.SolvedModule:
    style = STYLES[name]
    arguments = style.arguments()
    compiled = fxjacobi.compile(style.sample, measure=False, **options)
    for seed in range(3):
        torch.manual_seed(seed)
        found = compiled(*arguments)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        wanted = style.sample(*arguments)
        for a, b in zip(tree_leaves(found), tree_leaves(wanted), strict=True):
            assert equal(a, b)
        assert torch.equal(state, torch.get_rng_state())
    assert compiled.report.solved, compiled.report.reason
    return compiled


@pytest.mark.parametrize("name", STYLES)
def test_the_sample_is_the_ordinary_one(name: str) -> None:
    style, compiled = STYLES[name], _solved(name)
    collapsed = [block for block in compiled.plan.blocks if block.kind is Kind.WRITES]
    if style.refused:
        assert not collapsed
        assert any(style.refused in block.reason for block in compiled.plan.blocks), str(compiled.plan)
    else:
        assert collapsed, str(compiled.plan)


@pytest.mark.parametrize(
    "name", ["last_token_state", "counter_and_finished", "snapshots", "list_of_params", "state_of_what_is_written"]
)
def test_a_window_gives_the_same_sample(name: str) -> None:
    compiled = _solved(name, method="windowed")
    assert any("window" in block.method for block in compiled.plan.blocks if block.kind is Kind.WRITES)


def test_there_are_as_many_styles_as_were_written() -> None:
    assert len(STYLES) >= 52
    assert sum(bool(style.refused) for style in STYLES.values()) == 4
