"""Matrix products. A matrix that is the same at every step is laid out once for the processor's vectors.

    y[m, n] = sum over k of a[m, k] b[k, n]

``b`` is kept in tiles of as many columns as a few vector registers hold, ``(tiles, K, columns)``: for each ``k`` one element of
``a`` is multiplied by a whole row of a tile, so that nothing is summed across a vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from llvmlite import ir

from fxjacobi.native.emitter import INDEX, NUMBERS, NoMachineFormError
from fxjacobi.native.pointwise import pointwise
from fxjacobi.native.rules import RULES, TOGETHER
from fxjacobi.native.values import Value, at_strides, filled, moved, remembered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.graph import TensorSpec
    from fxjacobi.native.emitter import Emitter

__all__ = ["product", "products"]

_REGISTERS = 4
"""Vector registers that a tile's row takes: fewer sums would wait for one another."""


_TERMS = 16
"""Products that are summed one after another: sums of sums round less than one long sum does."""


def product(emitter: Emitter, a: Value, b: Value) -> Value:
    """Return the product of ``(M, K)`` and ``(K, N)``."""
    return products(emitter, [(a, b)])[0]


def products(emitter: Emitter, pairs: Sequence[tuple[Value, Value]]) -> list[Value]:
    """Return the product of each pair; where the second is one matrix, the same at every step, it is gone through once."""
    matrix = pairs[0][1]
    for a, b in pairs:
        if a.dtype is not b.dtype or not a.dtype.is_floating_point:
            raise NoMachineFormError(f"a product of {a.dtype} and {b.dtype}")
    if matrix.steady and all(b is matrix for _, b in pairs):
        return _tiled(emitter, [a for a, _ in pairs], matrix)
    return [_tiled(emitter, [a], b)[0] if b.steady else _plain(emitter, a, b) for a, b in pairs]


def _plain(emitter: Emitter, a: Value, b: Value) -> Value:
    """Sum by sum, for matrices that change from step to step."""
    a, b = remembered(emitter, a), remembered(emitter, b)
    (rows, inner), columns = a.shape, b.shape[1]

    def fill(pointer: Any) -> None:
        with emitter.loop(rows) as m, emitter.loop(columns) as n:
            with emitter.fold(inner, [emitter.number(0.0, a.dtype)]) as (k, (total,), left):
                left.append(emitter.multiply_add(a.at([m, k]), b.at([k, n]), total))
            place = emitter.builder.add(emitter.builder.mul(m, emitter.index(columns)), n)
            emitter.store(left[0], pointer, place, a.dtype)

    return filled(emitter, (rows, columns), a.dtype, fill)


def _tiled(emitter: Emitter, left: Sequence[Value], b: Value) -> list[Value]:
    left = [remembered(emitter, a) for a in left]
    (rows, inner), columns = left[0].shape, b.shape[1]
    dtype, split = b.dtype, emitter.splits(left[0].shape)
    registers = emitter.width * 4 // dtype.itemsize
    width = min(_REGISTERS * registers, 2 ** math.ceil(math.log2(max(columns, 2))))
    tiles = -(-columns // width)
    with emitter.once():
        packed = _packed(emitter, b, width, tiles)
    whole = tiles * width
    found = [emitter.scratch(rows * whole, dtype) for _ in left]
    together = 4 if emitter.width >= 16 else 2
    with emitter.loop(tiles) as tile:
        at = emitter.builder.mul(tile, emitter.index(inner * width))
        matrix = _Tile(emitter.offset(packed, at, NUMBERS[dtype]), tile, width, whole)
        if split:
            for a, out in zip(left, found, strict=True):
                assert emitter.samples is not None
                _range_of_rows(emitter, a, out, matrix, emitter.samples.first, emitter.samples.last, together)
        else:
            every = [(a, out, emitter.index(m)) for a, out in zip(left, found, strict=True) for m in range(rows)]
            if len(every) <= together:
                _rows(emitter, every, matrix)
            else:
                for a, out in zip(left, found, strict=True):
                    _range_of_rows(emitter, a, out, matrix, emitter.index(0), emitter.index(rows), together)
    return [at_strides(emitter, out, (rows, columns), (whole, 1), dtype, split=split) for out in found]


@dataclass(frozen=True, slots=True)
class _Tile:
    """A tile of the matrix, its number and columns, and the columns of all."""

    pointer: Any
    number: Any
    width: int
    whole: int


def _range_of_rows(emitter: Emitter, a: Value, out: Any, tile: _Tile, first: Any, last: Any, together: int) -> None:
    """Multiply rows ``first .. last - 1``, as many together as there are registers for."""
    builder, count = emitter.builder, emitter.builder.sub(last, first)
    for size in (together, 1):
        groups = builder.udiv(count, emitter.index(size))
        some = builder.icmp_signed(">", groups, emitter.index(0))
        with emitter.where(some), emitter.loop(groups) as group:
            start = builder.add(first, builder.mul(group, emitter.index(size)))
            _rows(emitter, [(a, out, builder.add(start, emitter.index(r))) for r in range(size)], tile)
        done = builder.mul(groups, emitter.index(size))
        first, count = builder.add(first, done), builder.sub(count, done)


def _packed(emitter: Emitter, b: Value, width: int, tiles: int) -> Any:
    """Lay ``b`` out in tiles, zeros where the last one is wider than it."""
    inner, columns = b.shape
    packed = emitter.scratch(tiles * inner * width, b.dtype)

    def put(tile: Any, column: Any, count: int, *, zero: bool) -> None:
        with emitter.loop(count) as j:
            at = emitter.builder.add(column, j) if column is not None else j
            with emitter.loop(inner) as k:
                row = emitter.builder.add(emitter.builder.mul(tile, emitter.index(inner)), k)
                place = emitter.builder.add(emitter.builder.mul(row, emitter.index(width)), at)
                source = emitter.builder.add(emitter.builder.mul(tile, emitter.index(width)), at)
                value = emitter.number(0.0, b.dtype) if zero else b.at([k, source])
                emitter.store(value, packed, place, b.dtype)

    full, rest = divmod(columns, width)
    if full:
        with emitter.loop(full) as tile:
            put(tile, None, width, zero=False)
    if rest:
        put(emitter.index(full), None, rest, zero=False)
        put(emitter.index(full), emitter.index(rest), width - rest, zero=True)
    assert full + (rest > 0) == tiles
    return packed


def _rows(emitter: Emitter, rows: Sequence[tuple[Value, Any, Any]], tile: _Tile) -> None:
    """Multiply some rows (a matrix, where its product goes, a place) by a tile, in sums of :data:`_TERMS` terms, then summed."""
    builder = emitter.builder
    dtype, inner, width = rows[0][0].dtype, rows[0][0].shape[1], tile.width
    zeros = [ir.Constant(ir.VectorType(NUMBERS[dtype], width), [0.0] * width)] * len(rows)
    blocks, rest = divmod(inner, _TERMS)
    totals = zeros

    def block(start: Any, terms: int) -> list[Any]:
        with emitter.fold(terms, zeros) as (i, sums, left):
            k = builder.add(start, i)
            pointer = emitter.offset(tile.pointer, builder.mul(k, emitter.index(width)), NUMBERS[dtype])
            line = builder.load(pointer, typ=zeros[0].type, align=dtype.itemsize)
            for (a, _, m), so_far in zip(rows, sums, strict=True):
                with emitter.own([m]):
                    factor = _spread(emitter, a.at([m, k]), width)
                left.append(emitter.multiply_add(factor, line, so_far))
        return left

    if blocks:
        with emitter.fold(blocks, totals) as (i, sums, left):
            found = block(builder.mul(i, emitter.index(_TERMS)), _TERMS)
            left.extend(builder.fadd(s, f) for s, f in zip(sums, found, strict=True))
        totals = left
    if rest:
        found = block(emitter.index(blocks * _TERMS), rest)
        totals = [builder.fadd(s, f) for s, f in zip(totals, found, strict=True)]
    start = builder.mul(tile.number, emitter.index(width))
    for (_, out, m), total in zip(rows, totals, strict=True):
        place = builder.add(builder.mul(m, emitter.index(tile.whole)), start)
        builder.store(total, emitter.offset(out, place, NUMBERS[dtype]), align=dtype.itemsize)


def _spread(emitter: Emitter, value: Any, width: int) -> Any:
    """Return a vector of equal elements."""
    vector = ir.VectorType(value.type, width)
    first = emitter.builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(INDEX, 0))
    mask = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
    return emitter.builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)


def _plus(emitter: Emitter, spec: TensorSpec, c: Value, y: Value, beta: float = 1, alpha: float = 1) -> Value:
    def compute(bias: Any, total: Any) -> Any:
        if alpha != 1:
            total = emitter.builder.fmul(total, ir.Constant(total.type, float(alpha)))
        if beta != 1:
            bias = emitter.builder.fmul(bias, ir.Constant(bias.type, float(beta)))
        return emitter.builder.fadd(bias, total)

    if beta == 0:
        raise NoMachineFormError("a product that does not add what it is given")  # torch ignores NaN in it
    return pointwise(emitter, spec.shape, spec.dtype, [c, y], compute)


def _turned(x: Value) -> Value:
    """Return a vector as a matrix of one row."""
    return Value((1, *x.shape), x.dtype, lambda index: x.at(index[1:]), x.cheap, x.steady, depth=x.depth)


def _transposed(a: Value) -> Value:
    return moved(a, (a.shape[1], a.shape[0]), lambda index: [index[1], index[0]])


def _vector(emitter: Emitter, y: Value) -> Value:
    """Return a matrix of one row as a vector."""
    return Value(
        y.shape[1:],
        y.dtype,
        lambda index: y.at([emitter.index(0), *index]),
        True,
        False,
        None if y.split else y.pointer,
    )


_Calls: TypeAlias = "Sequence[tuple[tuple[Any, ...], dict[str, Any]]]"


@TOGETHER.register("mm")
def _mm(emitter: Emitter, _: TensorSpec, calls: _Calls) -> list[Value]:
    return products(emitter, [(a, b) for (a, b), _ in calls])


@TOGETHER.register("addmm")
def _addmm(emitter: Emitter, spec: TensorSpec, calls: _Calls) -> list[Value]:
    found = products(emitter, [(args[1], args[2]) for args, _ in calls])
    return [_plus(emitter, spec, args[0], y, **kwargs) for (args, kwargs), y in zip(calls, found, strict=True)]


def _times(emitter: Emitter, pairs: Sequence[tuple[Value, Value]]) -> list[Value]:
    """Return ``a x`` of matrices and vectors, as ``x^T a^T``."""
    turned: dict[int, Value] = {}
    rows = [(_turned(x), turned.setdefault(id(a), _transposed(a))) for a, x in pairs]
    return [_vector(emitter, y) for y in products(emitter, rows)]


@TOGETHER.register("mv")
def _mv(emitter: Emitter, _: TensorSpec, calls: _Calls) -> list[Value]:
    return _times(emitter, [(a, x) for (a, x), _ in calls])


@TOGETHER.register("addmv")
def _addmv(emitter: Emitter, spec: TensorSpec, calls: _Calls) -> list[Value]:
    found = _times(emitter, [(args[1], args[2]) for args, _ in calls])
    return [_plus(emitter, spec, args[0], y, **kwargs) for (args, kwargs), y in zip(calls, found, strict=True)]


@RULES.register("dot")
def _dot(emitter: Emitter, _: TensorSpec, x: Value, y: Value) -> Value:
    column = moved(y, (*y.shape, 1), lambda index: index[:1])
    total = product(emitter, _turned(x), column)
    return Value((), x.dtype, lambda _: total.at([emitter.index(0)] * 2), True, False)


def _bmm(emitter: Emitter, spec: TensorSpec, a: Value, b: Value) -> Value:
    a, b = remembered(emitter, a), remembered(emitter, b)
    (batch, rows, inner), columns = a.shape, b.shape[2]

    def fill(pointer: Any) -> None:
        with emitter.over((batch, rows, columns)) as (i, m, n):
            with emitter.fold(inner, [emitter.number(0.0, a.dtype)]) as (k, (total,), left):
                left.append(emitter.multiply_add(a.at([i, m, k]), b.at([i, k, n]), total))
            row = emitter.builder.add(emitter.builder.mul(i, emitter.index(rows)), m)
            emitter.store(
                left[0], pointer, emitter.builder.add(emitter.builder.mul(row, emitter.index(columns)), n), a.dtype
            )

    return filled(emitter, spec.shape, spec.dtype, fill)


RULES.register("bmm")(_bmm)


@RULES.register("baddbmm")
def _baddbmm(
    emitter: Emitter, spec: TensorSpec, c: Value, a: Value, b: Value, beta: float = 1, alpha: float = 1
) -> Value:
    return _plus(emitter, spec, c, _bmm(emitter, spec, a, b), beta, alpha)
