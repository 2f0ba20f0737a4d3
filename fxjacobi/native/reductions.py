"""Sums, means and extrema along dimensions, one element after another."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from llvmlite import ir

from fxjacobi.graph import TensorSpec
from fxjacobi.native.emitter import NoMachineFormError
from fxjacobi.native.pointwise import pointwise
from fxjacobi.native.rules import RULES
from fxjacobi.native.values import Value, at_strides, dense_strides, filled, remembered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxjacobi.native.emitter import Emitter

__all__: list[str] = []


def _reduced(
    emitter: Emitter, spec: TensorSpec, x: Value, dims: Any, first: float, join: Callable[[Any, Any], Any], scale: float
) -> Value:
    """Return ``scale`` times the elements along ``dims`` joined together, beginning with ``first``."""
    if not x.dtype.is_floating_point or x.dtype is not spec.dtype:
        raise NoMachineFormError(f"a reduction from {x.dtype} to {spec.dtype}")
    rank = len(x.shape)
    wanted = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    along = sorted({d % rank for d in wanted} if rank else ())
    kept = [d for d in range(rank) if d not in along]
    outer, inner = [x.shape[d] for d in kept], [x.shape[d] for d in along]
    strides = dense_strides(outer)

    def fill(pointer: Any) -> None:
        with emitter.over(outer) as rest:
            place = emitter.index(0)
            for i, stride in zip(rest, strides, strict=True):
                place = emitter.builder.add(place, emitter.builder.mul(i, emitter.index(stride)))

            def folded(index: list[Any], shape: Sequence[int], total: Any) -> Any:
                if not shape:
                    at: list[Any] = [None] * rank
                    for d, i in (*zip(kept, rest, strict=True), *zip(along, index, strict=True)):
                        at[d] = i
                    return join(total, x.at(at))
                with emitter.fold(shape[0], [total]) as (i, (so_far,), left):
                    left.append(folded([*index, i], shape[1:], so_far))
                return left[0]

            total = folded([], inner, emitter.number(first, x.dtype))
            if scale != 1.0:
                total = emitter.builder.fmul(total, ir.Constant(total.type, scale))
            emitter.store(total, pointer, place, x.dtype)

    return filled(emitter, spec.shape, spec.dtype, fill)


@RULES.register("sum", "sum.dim_IntList")
def _sum(emitter: Emitter, spec: TensorSpec, x: Value, dims: Any = None, *_: Any, **__: Any) -> Value:
    return _reduced(emitter, spec, x, dims, 0.0, emitter.builder.fadd, 1.0)


def _mean(emitter: Emitter, spec: TensorSpec, x: Value, dims: Any = None, *_: Any, **__: Any) -> Value:
    scale = math.prod(spec.shape) / math.prod(x.shape)
    return _reduced(emitter, spec, x, dims, 0.0, emitter.builder.fadd, scale)


RULES.register("mean", "mean.dim")(_mean)


def _kept(x: Value, dims: Any) -> TensorSpec:
    """Return the spec of a reduction of ``x`` that keeps its dimensions."""
    rank = len(x.shape)
    wanted = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % rank for d in wanted} if rank else set()
    shape = tuple(1 if d in gone else n for d, n in enumerate(x.shape))
    return TensorSpec(shape, x.dtype, torch.device("cpu"), dense_strides(shape))


def _moments(emitter: Emitter, x: Value, dims: Any, correction: float) -> tuple[Value, Value]:
    """Return the mean and ``sum (x - mean)^2 / (n - correction)`` along dimensions, which are kept."""
    x = remembered(emitter, x)
    spec = _kept(x, dims)
    mean = _mean(emitter, spec, x, dims)
    apart = pointwise(emitter, x.shape, x.dtype, [x, mean], emitter.builder.fsub)
    square = pointwise(emitter, x.shape, x.dtype, [remembered(emitter, apart)] * 2, emitter.builder.fmul)
    count = math.prod(x.shape) // math.prod(spec.shape)
    if count <= correction:
        raise NoMachineFormError("the variance of too few elements")
    return mean, _reduced(emitter, spec, square, dims, 0.0, emitter.builder.fadd, 1.0 / (count - correction))


def _shaped(emitter: Emitter, value: Value, spec: TensorSpec) -> Value:
    """Return a value in memory with other dimensions of one element."""
    return at_strides(
        emitter, value.pointer, spec.shape, dense_strides(spec.shape), value.dtype,
        split=value.split and emitter.splits(spec.shape),
    )  # fmt: skip


def _correction(correction: float | None) -> float:
    return 1.0 if correction is None else float(correction)


@RULES.register("var.correction")
def _var(
    emitter: Emitter, spec: TensorSpec, x: Value, dims: Any = None, *, correction: float | None = None, **_: Any
) -> Value:
    return _shaped(emitter, _moments(emitter, x, dims, _correction(correction))[1], spec)


@RULES.register("var_mean.correction")
def _var_mean(
    emitter: Emitter, spec: TensorSpec, x: Value, dims: Any = None, *, correction: float | None = None, **_: Any
) -> list[Value]:
    mean, variance = _moments(emitter, x, dims, _correction(correction))
    return [_shaped(emitter, variance, spec), _shaped(emitter, mean, spec)]


@RULES.register("native_layer_norm")
def _layer_norm(
    emitter: Emitter, spec: TensorSpec, x: Value, shape: Any, weight: Value | None, bias: Value | None, eps: float
) -> list[Value]:
    mean, variance = _moments(emitter, x, list(range(-len(shape), 0)), 0.0)

    def inverse(v: Any) -> Any:
        total = emitter.builder.fadd(v, ir.Constant(v.type, eps))
        return emitter.builder.fdiv(ir.Constant(v.type, 1.0), emitter.intrinsic("llvm.sqrt", total))

    scale = remembered(emitter, pointwise(emitter, variance.shape, spec.dtype, [variance], inverse))
    value = pointwise(emitter, spec.shape, spec.dtype, [x, mean], emitter.builder.fsub)
    for factor in (scale, weight):
        if factor is not None:
            value = pointwise(emitter, spec.shape, spec.dtype, [value, factor], emitter.builder.fmul)
    if bias is not None:
        value = pointwise(emitter, spec.shape, spec.dtype, [value, bias], emitter.builder.fadd)
    return [value, mean, scale]


@RULES.register("amax")
def _amax(emitter: Emitter, spec: TensorSpec, x: Value, dims: Any = None, *_: Any) -> Value:
    return _reduced(emitter, spec, x, dims, -math.inf, lambda a, b: emitter.intrinsic("llvm.maximum", a, b), 1.0)


@RULES.register("amin")
def _amin(emitter: Emitter, spec: TensorSpec, x: Value, dims: Any = None, *_: Any) -> Value:
    return _reduced(emitter, spec, x, dims, math.inf, lambda a, b: emitter.intrinsic("llvm.minimum", a, b), 1.0)
