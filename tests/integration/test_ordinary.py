"""Compiled output equals ordinary output, bit for bit, on the recorded call and on fresh inputs."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fxjacobi
from fxjacobi.trees import split
from fxjacobi.verify import equal
from tests.integration.models import CASES, Case


def _assert_same(found: Any, wanted: Any) -> None:
    found_skeleton, found_tensors = split(found)
    wanted_skeleton, wanted_tensors = split(wanted)
    assert found_skeleton == wanted_skeleton
    for a, b in zip(found_tensors, wanted_tensors, strict=True):
        assert equal(a, b)


def _run(case: Case, calls: int, *, measure: bool) -> fxjacobi.SolvedModule:
    torch.manual_seed(0)
    original = case.make()
    twin = copy.deepcopy(original)
    compiled = fxjacobi.compile(twin, measure=measure)
    for call in range(calls):
        torch.manual_seed(100 + call)
        args = case.inputs()
        twin_args = copy.deepcopy(args)
        torch.manual_seed(200 + call)
        wanted = original(*args)
        state = torch.get_rng_state()
        torch.manual_seed(200 + call)
        found = compiled(*twin_args)
        _assert_same(found, wanted)
        _assert_same(twin_args, args)  # in-place writes to the arguments
        assert torch.equal(torch.get_rng_state(), state)
        if isinstance(original, nn.Module):
            assert isinstance(twin, nn.Module)
            _assert_same(dict(twin.state_dict()), dict(original.state_dict()))
            if hasattr(original, "membrane"):
                _assert_same(twin.membrane, original.membrane)
    return compiled


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_emitted_module_is_exact(case: Case) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")  # a demoted block or a refused capture is not what is tested here
        compiled = _run(case, 4, measure=False)
    kinds = {block.kind.value for block in compiled.plan.blocks if block.kind is not None}
    assert kinds >= set(case.kinds), str(compiled.plan)
    placed = [name for block in compiled.plan.blocks for name in block.nodes]
    assert len(placed) == len(set(placed))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_measured_module_is_exact(case: Case) -> None:
    with torch.no_grad():
        _run(case, 3, measure=True)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_gradients_are_the_ordinary_ones(case: Case) -> None:
    torch.manual_seed(0)
    original = case.make()
    twin = copy.deepcopy(original)
    compiled = fxjacobi.compile(twin, measure=False)
    for call in range(2):
        torch.manual_seed(call)
        leaves = [a for a in case.inputs() if isinstance(a, torch.Tensor)]
        if not leaves or not all(a.is_floating_point() for a in leaves) or case.name in ("in place", "no steps"):
            pytest.skip("no differentiable inputs")
        first = [a.clone().requires_grad_() for a in leaves]
        second = [a.clone().requires_grad_() for a in leaves]
        torch.manual_seed(7)
        wanted = split(original(*first))[1]
        torch.manual_seed(7)
        found = split(compiled(*second))[1]
        for a, b in zip(found, wanted, strict=True):
            assert equal(a, b)
            assert a.requires_grad == b.requires_grad
        if not any(b.requires_grad for b in wanted):
            continue
        try:
            sum((b.real.sum() for b in wanted if b.requires_grad), start=torch.zeros(())).backward()
        except RuntimeError:
            pytest.skip("the ordinary run writes over what its own backward needs")
        sum((a.real.sum() for a in found if a.requires_grad), start=torch.zeros(())).backward()
        for a, b in zip(second, first, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, equal_nan=True)
        if hasattr(original, "membrane"):
            return  # its state now holds a freed graph, ordinarily too
