"""Transcendental functions as arithmetic that vectorises; NaN stays NaN, and overflow becomes what it is in the C library.

For float32, ``e^x = 2^n e^r`` with ``n = round(x / ln 2)`` and ``|r| <= ln 2 / 2``, where a Taylor polynomial of degree 7 is
within ``|r|^8 / 8! < 6e-9`` of ``e^r - 1``. For float64 the C library's functions are called, element by element.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from llvmlite import ir

if TYPE_CHECKING:
    from fxjacobi.native.emitter import Emitter

__all__ = ["exp", "expm1", "sigmoid", "tanh"]

_WORD = ir.IntType(32)
_ROUNDING = 1.5 * 2.0**23
"""Added to a float32 below 2^22, it leaves the nearest integer in the low bits."""

_LN2_HIGH = 0.693359375  # 10 bits: its product with n is exact
_LN2_LOW = math.log(2.0) - _LN2_HIGH

_LEAST, _MOST = -104.0, 89.0
"""Where e^x is zero and infinite in float32."""


def _single(x: Any) -> bool:
    return isinstance(x.type, ir.FloatType)


def _const(x: Any, value: float) -> Any:
    return ir.Constant(x.type, value)


def _clamped(emitter: Emitter, x: Any, least: float, most: float) -> Any:
    """Return ``x`` within bounds; comparisons with NaN are false, so that it stays."""
    builder = emitter.builder
    x = emitter.select(builder.fcmp_ordered("<", x, _const(x, least)), _const(x, least), x)
    return emitter.select(builder.fcmp_ordered(">", x, _const(x, most)), _const(x, most), x)


def _parts(emitter: Emitter, x: Any) -> tuple[Any, Any]:
    """Return ``n`` (an integer) and ``e^r - 1``."""
    builder = emitter.builder
    magic = _const(x, _ROUNDING)
    shifted = emitter.multiply_add(x, _const(x, 1.0 / math.log(2.0)), magic)
    n = builder.fsub(shifted, magic)
    whole = builder.sub(builder.bitcast(shifted, _WORD), builder.bitcast(magic, _WORD))
    r = emitter.multiply_add(n, _const(x, -_LN2_HIGH), x)
    r = emitter.multiply_add(n, _const(x, -_LN2_LOW), r)
    series = _const(x, 1.0 / math.factorial(7))
    for order in range(6, 1, -1):
        series = emitter.multiply_add(series, r, _const(x, 1.0 / math.factorial(order)))
    return whole, emitter.multiply_add(builder.fmul(series, r), r, r)


def _power_of_two(emitter: Emitter, n: Any) -> Any:
    """Return ``2^n`` in float32, for ``n`` in -126 .. 127."""
    builder = emitter.builder
    biased = builder.add(n, ir.Constant(_WORD, 127))
    return builder.bitcast(builder.shl(biased, ir.Constant(_WORD, 23)), ir.FloatType())


def exp(emitter: Emitter, x: Any) -> Any:
    """``e^x``."""
    if not _single(x):
        return emitter.intrinsic("llvm.exp", x)
    builder = emitter.builder
    n, rest = _parts(emitter, _clamped(emitter, x, _LEAST, _MOST))
    # In two halves: 2^n itself may be too large, or too small, where the product is not.
    half = builder.ashr(n, ir.Constant(_WORD, 1))
    value = builder.fadd(rest, _const(x, 1.0))
    value = builder.fmul(value, _power_of_two(emitter, half))
    return builder.fmul(value, _power_of_two(emitter, builder.sub(n, half)))


def _expm1_between(emitter: Emitter, x: Any) -> Any:
    """``e^x - 1`` for ``|x| <= 80``, or NaN."""
    n, rest = _parts(emitter, x)
    scale = _power_of_two(emitter, n)
    return emitter.multiply_add(scale, rest, emitter.builder.fsub(scale, _const(x, 1.0)))


def expm1(emitter: Emitter, x: Any) -> Any:
    """``e^x - 1``, to the last digits near zero."""
    if not _single(x):
        return emitter.library("expm1", x)
    near = _expm1_between(emitter, _clamped(emitter, x, -80.0, 80.0))
    far = emitter.builder.fcmp_ordered(">", x, _const(x, 80.0))
    return emitter.select(far, exp(emitter, x), near)


_ODD = (-1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075)
"""Taylor's coefficients of tanh x after x; the next term is below 1e-10 for |x| <= 0.35."""


def tanh(emitter: Emitter, x: Any) -> Any:
    """``tanh |x| = m / (m + 2)`` with ``m = e^{2|x|} - 1``, with the sign put back; a series near zero."""
    if not _single(x):
        return emitter.library("tanh", x)
    builder = emitter.builder
    size = emitter.intrinsic("llvm.fabs", x)
    m = _expm1_between(emitter, _clamped(emitter, builder.fadd(size, size), 0.0, 40.0))
    far = emitter.intrinsic("llvm.copysign", builder.fdiv(m, builder.fadd(m, _const(x, 2.0))), x)
    square = builder.fmul(x, x)
    series = _const(x, _ODD[-1])
    for coefficient in reversed(_ODD[:-1]):
        series = emitter.multiply_add(series, square, _const(x, coefficient))
    near = emitter.multiply_add(builder.fmul(series, square), x, x)
    return emitter.select(builder.fcmp_ordered("<", size, _const(x, 0.35)), near, far)


def sigmoid(emitter: Emitter, x: Any) -> Any:
    """``1 / (1 + e^{-x})``."""
    one = _const(x, 1.0)
    return emitter.builder.fdiv(one, emitter.builder.fadd(one, exp(emitter, emitter.builder.fneg(x))))
