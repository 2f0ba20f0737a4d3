"""A parallel prefix of any associative operation, and the scans of affine recurrences built on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Elements", "affine_scan", "associative_scan", "matrix_affine_scan", "strided_scan"]

Elements: TypeAlias = tuple[torch.Tensor, ...]
"""A stack of scan elements: tensors of equal length along dimension 0."""


def associative_scan(
    combine: Callable[[Elements, Elements], Elements], elements: Elements, *, reverse: bool = False
) -> Elements:
    """Return ``y_t = x_0 . x_1 . ... . x_t`` for all ``t`` of dimension 0, in O(T) work and O(log T) depth.

    Odd-even reduction (G. Blelloch, Prefix sums and their applications, 1990): combine neighbours, scan the half,
    fill in the rest.

    Args:
        combine: Associative; called on stacks ``(n, ...)`` of earlier and later elements (later and earlier, if
            reversed).
        elements: Tensors of equal length ``T`` along dimension 0.
        reverse: Scan from the end: ``y_t = x_t . ... . x_{T-1}``.
    """
    if reverse:
        flipped = tuple(e.flip(0) for e in elements)
        return tuple(e.flip(0) for e in associative_scan(combine, flipped))
    length = elements[0].shape[0]
    if length < 2:
        return elements
    pairs = combine(tuple(e[: length - 1 : 2] for e in elements), tuple(e[1::2] for e in elements))
    odd = associative_scan(combine, pairs)
    result = tuple(torch.empty_like(e, memory_format=torch.contiguous_format) for e in elements)
    for whole, part, first in zip(result, odd, elements, strict=True):
        whole[1::2] = part
        whole[:1] = first[:1]
    if length > 2:
        before = tuple(o[: (length - 1) // 2] for o in odd)
        even = combine(before, tuple(e[2::2] for e in elements))
        for whole, part in zip(result, even, strict=True):
            whole[2::2] = part
    return result


def strided_scan(combine: Callable[[Elements, Elements], Elements], elements: Elements, distance: int) -> Elements:
    """:func:`associative_scan` of each of the ``d`` interleaved sequences ``t = r, r + d, r + 2d, ...``."""
    if distance == 1:
        return associative_scan(combine, elements)
    length = elements[0].shape[0]
    short = -length % distance
    padded = (torch.cat([e, e[-1:].expand(short, *e.shape[1:])]) if short else e for e in elements)
    scanned = associative_scan(combine, tuple(e.reshape(-1, distance, *e.shape[1:]) for e in padded))
    return tuple(e.flatten(0, 1)[:length] for e in scanned)


def _without_subnormals(products: torch.Tensor) -> torch.Tensor:
    """Return the products of factors, zero where they have left the normal range.

    Long products of factors below one end there, and processors are a hundred times slower on subnormal numbers. Such
    a factor moves a result by less than its rounding.
    """
    if products.is_complex():
        return products
    return torch.nn.functional.hardshrink(products, torch.finfo(products.dtype).tiny)


def affine_scan(factors: torch.Tensor, terms: torch.Tensor, distance: int = 1) -> torch.Tensor:
    """Return ``s_t = a_t * s_{t-d} + b_t`` elementwise, with ``s_t = b_t`` for ``t < d``; all of ``(T, ...)``."""

    def combine(first: Elements, second: Elements) -> Elements:
        return _without_subnormals(second[0] * first[0]), torch.addcmul(second[1], second[0], first[1])

    return strided_scan(combine, (factors, terms), distance)[1]


def matrix_affine_scan(factors: torch.Tensor, terms: torch.Tensor) -> torch.Tensor:
    """Return ``s_t = A_t s_{t-1} + b_t`` with ``s_0 = b_0``; ``factors`` (T, ..., N, N), ``terms`` (T, ..., N)."""

    def combine(first: Elements, second: Elements) -> Elements:
        return _without_subnormals(second[0] @ first[0]), (second[0] @ first[1].unsqueeze(-1)).squeeze(-1) + second[1]

    return associative_scan(combine, (factors, terms))[1]
