from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxjacobi.bits import equal_elements, first_difference, ulp_distance

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@given(st.floats(-1e300, 1e300), st.integers(0, 50))
def test_ulp_distance_counts_the_representable_values_between(value: float, steps: int) -> None:
    further = value
    for _ in range(steps):
        further = math.nextafter(further, math.inf)
    a, b = torch.tensor(value, dtype=torch.float64), torch.tensor(further, dtype=torch.float64)
    assert ulp_distance(a, b).item() == ulp_distance(b, a).item() == steps


@pytest.mark.parametrize("dtype", FLOATS)
def test_ulp_distance_of_special_values(dtype: torch.dtype) -> None:
    nan, inf, tiny = float("nan"), float("inf"), torch.finfo(dtype).smallest_normal
    got = torch.tensor([0.0, nan, nan, inf, -tiny, 1.0], dtype=dtype)
    want = torch.tensor([-0.0, nan, 1.0, torch.finfo(dtype).max, tiny, 1.0 + torch.finfo(dtype).eps], dtype=dtype)
    most = torch.iinfo(torch.int64).max
    distance = ulp_distance(got, want).tolist()
    assert distance[:4] == [0, 0, most, 1]
    assert distance[4] == round(2 * tiny / (torch.finfo(dtype).eps * tiny))
    assert distance[5] == 1


def test_ulp_distance_saturates_where_int64_overflows() -> None:
    far = torch.tensor([-math.inf, math.inf], dtype=torch.float64)
    assert ulp_distance(far, far.flip(0)).tolist() == [torch.iinfo(torch.int64).max] * 2


def test_ulp_distance_of_integers_bools_and_complex() -> None:
    assert ulp_distance(torch.tensor([3, -4]), torch.tensor([5, -4])).tolist() == [2, 0]
    assert ulp_distance(torch.tensor([True]), torch.tensor([False])).tolist() == [1]
    z = torch.tensor([1 + 1j], dtype=torch.complex128)
    w = torch.tensor([complex(1, math.nextafter(1, 2))], dtype=torch.complex128)
    assert ulp_distance(z, w).tolist() == [1]


def test_ulp_distance_refuses_other_shapes_and_dtypes() -> None:
    with pytest.raises(ValueError, match="equal shapes and dtypes"):
        ulp_distance(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="equal shapes and dtypes"):
        ulp_distance(torch.ones(2), torch.ones(2, dtype=torch.float64))


@given(st.lists(st.floats(width=32), max_size=5), st.lists(st.floats(width=32), max_size=5))
def test_equal_elements_is_ieee_equality_with_nan_matching_nan(left: list[float], right: list[float]) -> None:
    size = min(len(left), len(right))
    a, b = torch.tensor(left[:size]), torch.tensor(right[:size])
    same = np.array([x == y or (x != x and y != y) for x, y in zip(a.tolist(), b.tolist(), strict=True)], dtype=bool)
    assert equal_elements(a, b).tolist() == same.tolist()
    assert (first_difference(a, b) is None) == bool(same.all())


def test_first_difference_names_index_values_and_count() -> None:
    want = torch.arange(6, dtype=torch.float64).view(2, 3)
    got = want.clone()
    got[1, 0] = math.nextafter(3.0, 4.0)
    got[1, 2] = math.nan
    found = first_difference(got, want)
    assert found is not None
    assert (found.what, found.index, found.ulps, found.count, found.total) == ("value", (1, 0), 1, 2, 6)
    assert "2 of 6 elements differ, first at [1, 0]" in str(found)
    assert "1 ULP" in str(found)


@pytest.mark.parametrize(
    ("got", "what"),
    [(torch.ones(3), "shape"), (torch.ones(2, dtype=torch.float64), "dtype"), (torch.ones(2, device="meta"), "device")],
)
def test_first_difference_of_properties(got: torch.Tensor, what: str) -> None:
    found = first_difference(got, torch.ones(2))
    assert found is not None
    assert found.what == what


def test_first_difference_of_conjugated_views() -> None:
    z = torch.tensor([1 + 2j])
    assert first_difference(z.conj(), torch.tensor([1 - 2j])) is None
    assert first_difference(z.conj(), z) is not None
