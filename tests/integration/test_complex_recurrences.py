"""Recurrences whose state is complex: what each method makes of them, and what is measured of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import fxjacobi

if TYPE_CHECKING:
    from collections.abc import Callable


def turned(xs: torch.Tensor) -> torch.Tensor:
    z = torch.ones(3, 8, dtype=torch.complex64)
    for x in xs:
        z = z * (0.01 + 0.02j) + x
    return z


def turned_together(xs: torch.Tensor) -> torch.Tensor:
    z, turn = torch.ones(3, 8, dtype=torch.complex64), 0.02j * torch.eye(8)
    for x in xs:
        z = z @ turn + x
    return z


def mirrored(xs: torch.Tensor) -> torch.Tensor:
    """Affine over the reals only."""
    z = torch.ones(3, 8, dtype=torch.complex64)
    for x in xs:
        z = torch.conj_physical(z) * (0.3 + 0.2j) + x
    return z


@torch.no_grad()
@pytest.mark.parametrize("model", [turned, turned_together, mirrored])
@pytest.mark.parametrize("method", ["auto", "affine", "chunked", "windowed", "jacobi", "newton"])
def test_complex_recurrences_are_solved(model: Callable[[torch.Tensor], torch.Tensor], method: str) -> None:
    compiled = fxjacobi.compile(model, rtol=1e-4, method=method, measure=False, strict=True)
    xs = torch.randn(400, 3, 8)
    compiled(xs)
    wanted = model(xs)
    torch.testing.assert_close(compiled(xs), wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))
    assert compiled.report.solved
    assert "raised" not in str(compiled.plan)
    if method in ("affine", "newton"):
        reasons = " ".join(block.reason for block in compiled.plan.blocks)
        assert f"{method} was asked for, and is not lawful here" in reasons


@torch.no_grad()
def test_the_memory_of_a_complex_recurrence_is_measured() -> None:
    """It forgets by 0.9 a step: a hundred steps to a tolerance of 1e-5, not one."""

    def slow(xs: torch.Tensor) -> torch.Tensor:
        z = torch.ones(3, 8, dtype=torch.complex64)
        for x in xs:
            z = z * (0.9 + 0.0j) + x
        return z

    compiled = fxjacobi.compile(slow, rtol=1e-5, method="chunked", measure=False)
    xs = torch.randn(2000, 3, 8)
    compiled(xs)
    compiled(xs)
    block = compiled.report.blocks[-1]
    assert 50 <= int(block.method.split("(")[1].split(",")[0].rstrip(")")) <= 400
    assert block.sweeps <= 2
