"""One thread a test process, and Hypothesis' profiles (ci, dev, nightly)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

torch.set_num_threads(1)

# Whole programs are drawn and compiled: slow and large by design. Printing the blob lets a failure be replayed.
COMMON = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
settings.register_profile("dev", COMMON, max_examples=50)
settings.register_profile("ci", COMMON, max_examples=320, derandomize=True)
settings.register_profile("nightly", COMMON, max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves one thread and gradients enabled behind."""
    torch.manual_seed(0)
    yield
    assert torch.is_grad_enabled(), "a test left gradients disabled"
    assert torch.get_num_threads() == 1, "a test left another number of threads"
