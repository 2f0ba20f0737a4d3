"""How far rounding may carry a trajectory: the same steps beside it, disturbed at each by some epsilons.

    s'_t = h_t(s'_{t-d} + 128 eps (|s'_{t-d}| + mean |s_{t-d}|) z_t),   z_t random signs

Rounding disturbs every step of every run by an epsilon or so, the ordinary one's too. What becomes of that by step ``t``, however the
recurrence passes it on, is ``|s'_t - s_t| / 256``: measured along the trajectory itself, through all steps (the random rounding
of J. Vignes' CESTAC method, Math. Comput. Simul. 35, 1993, with a larger amplitude, that one sample may do).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from llvmlite import ir

from fxjacobi.native.emitter import NUMBERS, Emitter, element_of
from fxjacobi.native.values import Value, at_strides, dense_strides, place_of, remembered

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["DISTURBANCE", "Disturbed", "measured"]

DISTURBANCE = 256.0
"""Epsilons by which each read of the state is disturbed: half of them of an element's own size, half of the mean one."""

_WORD = ir.IntType(32)
_MIX = (0x9E3779B1, 0x85EBCA77, 0x2C1B3C6D, 0x297A2D39)
"""Odd numbers that a counter is multiplied by until its high bit looks random."""


class Disturbed:
    """The disturbed trajectory's memory of one component of the state, as many steps as are read back.

    Args:
        emitter: Where to.
        shape: Of the component.
        dtype: Likewise.
        reach: The furthest that a carry reads back.
    """

    def __init__(self, emitter: Emitter, shape: Sequence[int], dtype: torch.dtype, reach: int) -> None:
        self.shape, self.dtype, self.reach = tuple(shape), dtype, reach
        self.size = torch.Size(self.shape).numel()
        with emitter.once():
            self.ring = emitter.scratch(self.size * reach, dtype)
        self._emitter = emitter

    def row(self, t: Any) -> Any:
        """Return a pointer to step ``t``'s value."""
        emitter = self._emitter
        place = emitter.builder.srem(t, emitter.index(self.reach))
        return emitter.offset(self.ring, emitter.builder.mul(place, emitter.index(self.size)), element_of(self.dtype))

    def read(self, source: Any, mean: Any, t: Any) -> Value:
        """Return the value at ``source``, disturbed; ``mean``, a float64, is the mean magnitude of its elements."""
        emitter = self._emitter
        found = at_strides(emitter, source, self.shape, dense_strides(self.shape), self.dtype)
        if not self.dtype.is_floating_point:
            return remembered(emitter, Value(found.shape, found.dtype, found.at, True, False))

        epsilons = emitter.number(DISTURBANCE / 2 * torch.finfo(self.dtype).eps, self.dtype)
        mean = emitter.converted(mean, torch.float64, self.dtype)

        def at(index: list[Any]) -> Any:
            value = found.at(index)
            size = emitter.builder.fadd(emitter.intrinsic("llvm.fabs", value), mean)
            scale = emitter.builder.fmul(size, epsilons)
            up = emitter.builder.fadd(value, scale)
            down = emitter.builder.fsub(value, scale)
            return emitter.select(_coin(emitter, place_of(emitter, index, self.shape), t), up, down)

        return remembered(emitter, Value(self.shape, self.dtype, at, False, False))

    def keep(self, value: Value, t: Any) -> None:
        """Write what it came to at step ``t``."""
        emitter, row = self._emitter, self.row(t)
        with emitter.over(self.shape) as index:
            emitter.store(value.at(index), row, place_of(emitter, index, self.shape), self.dtype)


def _coin(emitter: Emitter, element: Any, t: Any) -> Any:
    """Return a random bit for an element at a step: a hash of both."""
    builder = emitter.builder
    mixed = [
        builder.mul(builder.trunc(v, _WORD), ir.Constant(_WORD, m)) for v, m in zip((element, t), _MIX, strict=False)
    ]
    word = builder.add(*mixed)
    for shift, factor in zip((15, 12), _MIX[2:], strict=True):
        word = builder.mul(builder.xor(word, builder.lshr(word, ir.Constant(_WORD, shift))), ir.Constant(_WORD, factor))
    return builder.icmp_signed("<", word, ir.Constant(_WORD, 0))


def measured(emitter: Emitter, value: Value, other: Value) -> tuple[Any, Any, Any]:
    """Return ``max |other - value|``, ``max |value|`` and ``mean |value|`` of two tensors in memory, as float64.

    NaN where there is one. Of bools: infinite where any differs, and zeros.
    """
    builder, dtype, size = emitter.builder, value.dtype, torch.Size(value.shape).numel()
    start, count = emitter.index(0), emitter.index(size)
    if emitter.samples is not None and emitter.splits(value.shape):
        row = emitter.index(size // value.shape[0])
        start = builder.mul(emitter.samples.first, row)
        count = builder.mul(builder.sub(emitter.samples.last, emitter.samples.first), row)
    here, there = (emitter.offset(v.pointer, start, element_of(dtype)) for v in (value, other))
    if dtype is torch.bool:
        with emitter.fold(count, [emitter.number(0, dtype)]) as (i, (differ,), left):
            left.append(builder.or_(differ, builder.xor(emitter.load(here, i, dtype), emitter.load(there, i, dtype))))
        zero = emitter.number(0.0, torch.float64)
        return emitter.select(left[0], emitter.number(math.inf, torch.float64), zero), zero, zero
    # As integers: magnitudes are ordered alike, NaN above all, and their maximum may be taken in any order.
    word = ir.IntType(8 * dtype.itemsize)

    def bits(x: Any) -> Any:
        return builder.bitcast(emitter.intrinsic("llvm.fabs", x), word)

    with emitter.fold(count, [ir.Constant(word, 0)] * 2 + [emitter.number(0.0, dtype)]) as (
        i,
        (far, large, total),
        left,
    ):
        a, b = emitter.load(here, i, dtype), emitter.load(there, i, dtype)
        left.append(emitter.intrinsic("llvm.umax", far, bits(builder.fsub(b, a))))
        left.append(emitter.intrinsic("llvm.umax", large, bits(a)))
        left.append(builder.fadd(total, emitter.intrinsic("llvm.fabs", a), flags=("reassoc",)))
    mean = builder.fdiv(left[2], builder.sitofp(count, NUMBERS[dtype]))
    found = (builder.bitcast(left[0], NUMBERS[dtype]), builder.bitcast(left[1], NUMBERS[dtype]), mean)
    far, large, mean = (emitter.converted(f, dtype, torch.float64) for f in found)
    return far, large, mean
