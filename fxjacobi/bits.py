"""Comparing tensors as the exactness contract does: IEEE ``==``, NaN matching NaN, and the distance in ULPs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Difference", "bits_of", "equal_elements", "first_difference", "same_bits", "ulp_distance"]

_FARTHEST = torch.iinfo(torch.int64).max
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Difference:
    """How two tensors differ.

    Args:
        what: The property that differs: ``"shape"``, ``"dtype"``, ``"device"`` or ``"value"``.
        got: The property's value here; for ``"value"``, the first element that differs.
        want: The same in the ordinary run.
        index: Index of the first element that differs; empty for the other properties.
        ulps: Its distance in units in the last place.
        count: Number of elements that differ.
        total: Number of elements.
    """

    what: str
    got: object
    want: object
    index: tuple[int, ...] = ()
    ulps: int = 0
    count: int = 0
    total: int = 0

    def __str__(self) -> str:
        if self.what != "value":
            return f"{self.what} is {self.got}, expected {self.want}"
        ulps = "not comparable in ULP" if self.ulps == _FARTHEST else f"{self.ulps} ULP apart"
        where = f"[{', '.join(map(str, self.index))}]"
        return f"{self.count} of {self.total} elements differ, first at {where}: {self.got!r}, expected {self.want!r} ({ulps})"


def _real(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def bits_of(value: torch.Tensor) -> torch.Tensor:
    """Return the bits as integers, both parts of complex numbers: NaN equals itself then, and -0.0 differs from 0.0."""
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    if value.is_neg():
        value = value.resolve_neg()
    return value.view(_INTEGER_OF_SIZE[value.element_size()])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same value to every bit: NaN equals itself, ``-0.0`` is not ``0.0``."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))


def equal_elements(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Return, for each element, whether ``got == want`` or both are NaN (each part of a complex number by itself)."""
    a, b = _real(got), _real(want)
    equal = a == b
    if a.is_floating_point():
        equal = equal | (torch.isnan(a) & torch.isnan(b))
    return equal.all(-1) if got.is_complex() else equal


def _ordered(value: torch.Tensor) -> torch.Tensor:
    """Map floats to integers in the same order, neighbours to neighbours, both zeros to 0."""
    integer = _INTEGER_OF_SIZE[value.element_size()]
    bits = value.contiguous().view(integer).to(torch.int64)
    magnitude = bits & torch.iinfo(integer).max
    return torch.where(bits < 0, -magnitude, magnitude)


def ulp_distance(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Return, for each element, the number of representable values from ``want`` to ``got`` (int64, saturating).

    Zero where both are NaN or zeros of either sign; the largest int64 where one is NaN and the other is not. Integers
    and bools give their absolute difference, complex numbers the larger distance of their two parts.

    Raises:
        ValueError: Shapes or dtypes differ.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        raise ValueError(
            f"ulp_distance takes equal shapes and dtypes, not {got.shape} {got.dtype}, {want.shape} {want.dtype}"
        )
    a, b = _real(got), _real(want)
    if a.is_floating_point():
        low, high = _ordered(a), _ordered(b)
    else:
        low, high = a.to(torch.int64), b.to(torch.int64)
    # |low - high| of two int64 may need 65 bits.
    overflow = ((low < 0) != (high < 0)) & (low.abs() > _FARTHEST - high.abs())
    distance = (low - high).abs().masked_fill(overflow, _FARTHEST)
    if a.is_floating_point():
        nan_a, nan_b = torch.isnan(a), torch.isnan(b)
        distance = distance.masked_fill(nan_a != nan_b, _FARTHEST).masked_fill(nan_a & nan_b, 0)
    return distance.amax(-1) if got.is_complex() else distance


def first_difference(got: torch.Tensor, want: torch.Tensor) -> Difference | None:
    """Return how ``got`` differs from ``want`` in dtype, shape, device or value, or ``None`` when they are equal.

    >>> first_difference(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")])) is None
    True
    """
    properties: tuple[tuple[str, object, object], ...] = (
        ("dtype", got.dtype, want.dtype),
        ("shape", tuple(got.shape), tuple(want.shape)),
        ("device", got.device, want.device),
    )
    for what, found, expected in properties:
        if found != expected:
            return Difference(what, found, expected)
    wrong = ~equal_elements(got, want)
    if not bool(wrong.any()):
        return None
    index = tuple(int(i) for i in wrong.nonzero()[0])
    ulps = int(ulp_distance(got[index], want[index]))
    return Difference(
        "value", got[index].item(), want[index].item(), index, ulps, count=int(wrong.sum()), total=wrong.numel()
    )
