"""Sampling loops whose steps read tensors that lie otherwise at each step: dense, expanded, columns of larger ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fxjacobi

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS, SAMPLES = 8, 37
WEIGHT = torch.randn(STEPS, STEPS, generator=torch.Generator().manual_seed(0)).tril(-1)


def laid_out(value: torch.Tensor, how: str) -> torch.Tensor:
    match how:
        case "expanded":
            return value[:1].expand(SAMPLES)
        case "column":
            return torch.stack([value, value], 1)[:, 0]
        case "transposed":
            return value[:, None].expand(SAMPLES, 2).clone().t()[1]
    return value.clone()


def written(values: list[torch.Tensor]) -> torch.Tensor:
    x = torch.zeros(SAMPLES, STEPS)
    for t in range(STEPS):
        x[:, t] = values[t]
    return x @ WEIGHT.T


def added(values: list[torch.Tensor]) -> torch.Tensor:
    x = torch.zeros(SAMPLES, STEPS)
    for t in range(STEPS):
        x[:, t] = torch.tanh(x @ WEIGHT.T)[:, t] + values[t]
    return x


def raised(values: list[torch.Tensor]) -> torch.Tensor:
    """``pow`` rounds otherwise for strided exponents."""
    x = torch.zeros(SAMPLES, STEPS)
    for t in range(STEPS):
        x[:, t] = torch.pow((x @ WEIGHT.T)[:, t].abs() + 0.1, values[t])
    return x


def handed_on(values: list[torch.Tensor]) -> torch.Tensor:
    x, last = torch.zeros(SAMPLES, STEPS), values[0]
    for t in range(STEPS):
        x[:, t] = torch.tanh(x @ WEIGHT.T)[:, t] + last
        last = values[t]
    return x


def restarted(values: list[torch.Tensor]) -> torch.Tensor:
    """The first of what a step hands on is dense, and the rest is expanded within the loop."""
    x, last = torch.zeros(SAMPLES, STEPS), values[0]
    for t in range(STEPS):
        x[:, t] = torch.tanh(x @ WEIGHT.T)[:, t] + last
        last = values[t][0].expand(SAMPLES)
    return x


@settings(max_examples=30)
@given(
    st.sampled_from([written, added, raised, handed_on, restarted]),
    st.lists(st.sampled_from(["dense", "expanded", "column", "transposed"]), min_size=STEPS, max_size=STEPS),
    st.randoms(use_true_random=False),
)
def test_each_step_reads_its_own_elements(run: Callable[..., torch.Tensor], layouts: list[str], random: object) -> None:
    torch.manual_seed(random.randrange(1 << 30))  # type: ignore[attr-defined]

    def values(scale: float) -> list[torch.Tensor]:
        return [laid_out(torch.randn(SAMPLES) * scale, how) for how in layouts]

    compiled = fxjacobi.compile(torch.no_grad()(run), measure=False)
    # The first result is compared with the ordinary one, so it must not tell the samples apart.
    for scale in (0.0, 1.0, 0.5):
        given_values = values(scale)
        with torch.no_grad():
            assert torch.equal(compiled(given_values), run(given_values))


@pytest.mark.parametrize("run", [added, restarted])
@pytest.mark.parametrize("dense", [{0}, {STEPS - 1}, {0, 1, 3, 5}, set(range(STEPS - 1))])
def test_a_loop_is_collapsed_where_bits_do_not_depend_on_layouts(
    run: Callable[..., torch.Tensor], dense: set[int]
) -> None:
    torch.manual_seed(0)
    compiled = fxjacobi.compile(torch.no_grad()(run), measure=False)
    for scale in (0.0, 1.0):
        values = [laid_out(torch.randn(SAMPLES) * scale, "dense" if t in dense else "expanded") for t in range(STEPS)]
        with torch.no_grad():
            assert torch.equal(compiled(values), run(values))
    assert "jacobi" in {block.method for block in compiled.report.blocks}


def test_the_plan_says_so_where_they_do() -> None:
    compiled = fxjacobi.compile(torch.no_grad()(raised), measure=False)
    for scale in (0.0, 1.0):
        values = [laid_out(torch.randn(SAMPLES) * scale, "column" if t in (1, 2, 5) else "dense") for t in range(STEPS)]
        with torch.no_grad():
            assert torch.equal(compiled(values), raised(values))
    assert any("laid out otherwise at other steps" in block.reason for block in compiled.plan.blocks)
