"""Scans against their loops."""

from __future__ import annotations

import pytest
import torch

from fxjacobi.methods.associative_scan import Elements, affine_scan, associative_scan, matrix_affine_scan


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 33])
@pytest.mark.parametrize("reverse", [False, True])
def test_an_operation_that_does_not_commute(length: int, reverse: bool) -> None:
    matrices = torch.randint(-2, 3, (length, 2, 2)).double()

    def combine(first: Elements, second: Elements) -> Elements:
        return (first[0] @ second[0],)

    found = associative_scan(combine, (matrices,), reverse=reverse)[0]
    product, wanted = torch.eye(2, dtype=torch.float64), []
    for t in reversed(range(length)) if reverse else range(length):
        product = product @ matrices[t]
        wanted.append(product)
    torch.testing.assert_close(found, torch.stack(wanted[::-1] if reverse else wanted))


@pytest.mark.parametrize("length", [1, 2, 5, 16, 31])
@pytest.mark.parametrize("distance", [1, 2, 3, 40])
def test_affine_scan(length: int, distance: int) -> None:
    factors, terms = torch.randn(length, 3).double(), torch.randn(length, 3).double()
    wanted = terms.clone()
    for t in range(distance, length):
        wanted[t] = factors[t] * wanted[t - distance] + terms[t]
    torch.testing.assert_close(affine_scan(factors, terms, distance), wanted)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_matrix_affine_scan(length: int) -> None:
    factors, terms = torch.randn(length, 2, 3, 3).double(), torch.randn(length, 2, 3).double()
    wanted = terms.clone()
    for t in range(1, length):
        wanted[t] += (factors[t] @ wanted[t - 1].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(matrix_affine_scan(factors, terms), wanted)


def test_long_products_leave_no_subnormals() -> None:
    factors, terms = torch.full((500, 1), 0.5), torch.ones(500, 1)
    assert affine_scan(factors, terms)[-1].item() == 2.0
    affine = affine_scan(torch.full((500, 1), float("nan")), terms)
    assert bool(torch.isnan(affine[1:]).all()), "a factor that is not a number must not become zero"
