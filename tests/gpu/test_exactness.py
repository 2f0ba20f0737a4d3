"""The exactness contract on a CUDA device."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings

from fxjacobi.testing import Program, programs
from tests.gpu import checks

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
    # torch says so, once a process, whenever the mode is set that makes waiting for the device an error.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

CUDA = torch.device("cuda")
OUTCOMES: Counter[str] = Counter()


@settings(max_examples=max(100, settings().max_examples // 2))
@given(programs())
def check_program(program: Program) -> None:
    checks.check_program(program, CUDA, OUTCOMES)


def test_compiled_programs_equal_the_ordinary_run() -> None:
    OUTCOMES.clear()
    check_program()
    assert OUTCOMES["programs"] >= 100
    assert OUTCOMES["solved"] > OUTCOMES["original"] / 3, f"too few calls ran an emitted module: {OUTCOMES}"
    assert OUTCOMES["demoted"] <= max(1, 0.01 * OUTCOMES["programs"]), f"too many programs were demoted: {OUTCOMES}"


def test_zukos_inverse() -> None:
    pytest.importorskip("zuko")
    checks.check_flow_inverse(CUDA)


def test_made_draws_the_same_sample() -> None:
    checks.check_made(CUDA)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixelcnnpp_draws_the_same_sample(channels: int) -> None:
    checks.check_pixelcnnpp(CUDA, channels)


def test_gru_in_the_exact_contract() -> None:
    checks.check_gru_exact(CUDA)


@pytest.mark.parametrize("method", ["jacobi", "windowed", "chunked", "quasi_newton", "picard", "anderson"])
def test_gru_at_a_tolerance(method: str) -> None:
    checks.check_gru_tolerance(CUDA, method)
