"""A sampling loop made smaller computes what the whole one does for the samples kept; what mixes samples is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from fxjacobi.array_loop import array_loop
from fxjacobi.sample_axis import NotPerSample
from fxjacobi.smaller_batch import smaller_batch
from tests.unit.test_fewer_samples import BATCH, KEEPING, MIXING, chains

if TYPE_CHECKING:
    from collections.abc import Callable

_KEPT = st.lists(st.sampled_from(sorted(KEEPING)), min_size=1, max_size=4)
_SIZES = st.integers(1, BATCH // 2)


def _chained(names: list[str]) -> Callable[[torch.Tensor], torch.Tensor]:
    table = KEEPING | MIXING

    def then(y: torch.Tensor) -> torch.Tensor:
        for name in names:
            y = torch.tanh(table[name](y))
        return y

    return then


@settings(deadline=None, max_examples=30)
@given(names=_KEPT, fewer=_SIZES, seed=st.integers(0, 2**16))
def test_fewer_samples_have_the_values_that_they_have_among_all(names: list[str], fewer: int, seed: int) -> None:
    note(f"{names}, {fewer} samples")
    generator = torch.Generator().manual_seed(seed)
    torch.set_default_dtype(torch.float64)  # so that other rounding does not turn a comparison over
    try:
        sampling = chains(torch.randn(BATCH, generator=generator), _chained(names))
        smaller = smaller_batch(array_loop(sampling.loop), 0, fewer)
        kept = torch.randperm(BATCH, generator=generator)[:fewer].sort().values
        with torch.no_grad():
            (found,) = smaller.loop(*smaller.operands(sampling.operands, kept))
        (wanted,) = sampling.ordinary()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, wanted[kept], rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=30)
@given(names=_KEPT, mixing=st.sampled_from(sorted(MIXING)), place=st.integers(0, 4), fewer=_SIZES)
def test_one_operation_that_mixes_samples_refuses(names: list[str], mixing: str, place: int, fewer: int) -> None:
    names = [*names[:place], mixing, *names[place:]]
    note(f"{names}, {fewer} samples")
    sampling = chains(torch.ones(BATCH), _chained(names))
    with pytest.raises(NotPerSample):
        smaller_batch(array_loop(sampling.loop), 0, fewer)
