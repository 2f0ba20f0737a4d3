"""Elementwise operations: fused into whatever reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from llvmlite import ir

from fxjacobi.native import functions
from fxjacobi.native.emitter import NUMBERS, Emitter, NoMachineFormError
from fxjacobi.native.rules import RULES, Given
from fxjacobi.native.values import Value, constant, remembered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxjacobi.graph import TensorSpec

__all__ = ["pointwise"]


_DEEPEST = 32
"""Operations that are fused into one expression."""


def _dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in NUMBERS:
        raise NoMachineFormError(f"elements of {dtype}")
    return dtype


def pointwise(
    emitter: Emitter,
    shape: Sequence[int],
    dtype: torch.dtype,
    operands: Sequence[Given],
    compute: Callable[..., Any],
    working: torch.dtype | None = None,
) -> Value:
    """Return ``compute`` of the operands' elements, broadcast to ``shape``.

    Args:
        emitter: Where to.
        shape: Of the result.
        dtype: Of the result.
        operands: Tensors and numbers.
        compute: Writes one element, from those of the operands.
        working: The dtype in which it takes them; that of the result by default.
    """
    working = _dtype(dtype) if working is None else working
    shape = tuple(shape)
    ready: list[Given] = []
    for operand in operands:
        again = isinstance(operand, Value) and not operand.cheap and operand.shape != shape
        ready.append(remembered(emitter, operand) if again and isinstance(operand, Value) else operand)

    def element(operand: Given, index: list[Any]) -> Any:
        if not isinstance(operand, Value):
            return emitter.number(operand, working)
        own = index[len(index) - len(operand.shape) :]
        at = [emitter.index(0) if size == 1 else i for i, size in zip(own, operand.shape, strict=True)]
        return emitter.converted(operand.at(at), operand.dtype, working)

    values = [o for o in ready if isinstance(o, Value)]
    steady, depth = all(v.steady for v in values), 1 + max((v.depth for v in values), default=0)
    found = Value(shape, dtype, lambda index: compute(*(element(o, index) for o in ready)), False, steady, depth=depth)
    return found if depth < _DEEPEST else remembered(emitter, found)


def _common(operands: Sequence[Given]) -> torch.dtype:
    """The dtype in which operands are compared."""
    found = [o for o in operands if isinstance(o, Value)]
    floats = [o for o in found if o.dtype is not torch.bool]
    if floats:  # a tensor without dimensions counts as a number beside one that has some
        some = {o.dtype for o in floats if o.shape} or {o.dtype for o in floats}
        return torch.float64 if torch.float64 in some else torch.float32
    return torch.bool if all(isinstance(o, (Value, bool)) for o in operands) else torch.float32


def _known(like: Any, value: float) -> Any:
    return ir.Constant(like.type, value)


def _relu(emitter: Emitter, x: Any) -> Any:
    zero = _known(x, 0.0)
    return emitter.select(emitter.builder.fcmp_ordered("<=", x, zero), zero, x)  # a NaN is not below zero: it stays


_UNARY: dict[str, Callable[[Emitter, Any], Any]] = {
    "neg": lambda e, x: e.builder.fneg(x),
    "abs": lambda e, x: e.intrinsic("llvm.fabs", x),
    "exp": functions.exp,
    "expm1": functions.expm1,
    "sigmoid": functions.sigmoid,
    "tanh": functions.tanh,
    "log": lambda e, x: e.intrinsic("llvm.log", x),
    "log1p": lambda e, x: e.library("log1p", x),
    "sqrt": lambda e, x: e.intrinsic("llvm.sqrt", x),
    "rsqrt": lambda e, x: e.builder.fdiv(_known(x, 1.0), e.intrinsic("llvm.sqrt", x)),
    "reciprocal": lambda e, x: e.builder.fdiv(_known(x, 1.0), x),
    "square": lambda e, x: e.builder.fmul(x, x),
    "sin": lambda e, x: e.intrinsic("llvm.sin", x),
    "cos": lambda e, x: e.intrinsic("llvm.cos", x),
    "erf": lambda e, x: e.library("erf", x),
    "floor": lambda e, x: e.intrinsic("llvm.floor", x),
    "ceil": lambda e, x: e.intrinsic("llvm.ceil", x),
    "trunc": lambda e, x: e.intrinsic("llvm.trunc", x),
    "relu": _relu,
}

_BINARY: dict[tuple[str, ...], Callable[[Emitter, Any, Any], Any]] = {
    ("mul.Tensor", "mul.Scalar"): lambda e, x, y: e.builder.fmul(x, y),
    ("div.Tensor", "div.Scalar"): lambda e, x, y: e.builder.fdiv(x, y),
    ("maximum",): lambda e, x, y: e.intrinsic("llvm.maximum", x, y),
    ("minimum",): lambda e, x, y: e.intrinsic("llvm.minimum", x, y),
    ("pow.Tensor_Tensor", "pow.Scalar"): lambda e, x, y: e.intrinsic("llvm.pow", x, y),
}

_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def _rule_of_one(compute: Callable[[Emitter, Any], Any]) -> Callable[..., Value]:
    def rule(emitter: Emitter, spec: TensorSpec, x: Value) -> Value:
        return _floats(emitter, spec, [x], lambda a: compute(emitter, a))

    return rule


def _rule_of_two(compute: Callable[[Emitter, Any, Any], Any]) -> Callable[..., Value]:
    def rule(emitter: Emitter, spec: TensorSpec, x: Given, y: Given) -> Value:
        return _floats(emitter, spec, [x, y], lambda a, b: compute(emitter, a, b))

    return rule


def _comparison(sign: str) -> Callable[..., Value]:
    def rule(emitter: Emitter, spec: TensorSpec, x: Given, y: Given) -> Value:
        working = _common([x, y])

        def compute(a: Any, b: Any) -> Any:
            if working is torch.bool:
                return emitter.builder.icmp_unsigned(sign, a, b)
            compare = emitter.builder.fcmp_unordered if sign == "!=" else emitter.builder.fcmp_ordered
            return compare(sign, a, b)

        return pointwise(emitter, spec.shape, torch.bool, [x, y], compute, working)

    return rule


def _floats(emitter: Emitter, spec: TensorSpec, operands: Sequence[Given], compute: Callable[..., Any]) -> Value:
    if spec.dtype is torch.bool:
        raise NoMachineFormError("arithmetic of bools")
    return pointwise(emitter, spec.shape, spec.dtype, operands, compute)


for _name, _one in _UNARY.items():
    RULES.register(_name)(_rule_of_one(_one))
for _names, _two in _BINARY.items():
    RULES.register(*_names)(_rule_of_two(_two))
for _name, _sign in _COMPARED.items():
    RULES.register(f"{_name}.Tensor", f"{_name}.Scalar")(_comparison(_sign))


@RULES.register("add.Tensor", "add.Scalar")
def _add(emitter: Emitter, spec: TensorSpec, x: Given, y: Given, alpha: float = 1) -> Value:
    def compute(a: Any, b: Any) -> Any:
        return emitter.builder.fadd(a, b) if alpha == 1 else emitter.multiply_add(b, _known(b, alpha), a)

    return _floats(emitter, spec, [x, y], compute)


def _sub(emitter: Emitter, spec: TensorSpec, x: Given, y: Given, alpha: float = 1) -> Value:
    def compute(a: Any, b: Any) -> Any:
        return emitter.builder.fsub(a, b) if alpha == 1 else emitter.multiply_add(b, _known(b, -alpha), a)

    return _floats(emitter, spec, [x, y], compute)


RULES.register("sub.Tensor", "sub.Scalar")(_sub)


@RULES.register("rsub.Tensor", "rsub.Scalar")
def _rsub(emitter: Emitter, spec: TensorSpec, x: Given, y: Given, alpha: float = 1) -> Value:
    return _sub(emitter, spec, y, x) if alpha == 1 else _refused("rsub with a factor")


@RULES.register("pow.Tensor_Scalar")
def _pow(emitter: Emitter, spec: TensorSpec, x: Value, exponent: Given) -> Value:
    if isinstance(exponent, Value):
        return _floats(emitter, spec, [x, exponent], lambda a, b: emitter.intrinsic("llvm.pow", a, b))

    def compute(a: Any) -> Any:
        builder = emitter.builder
        if exponent == 2:
            return builder.fmul(a, a)
        if exponent == 3:
            return builder.fmul(builder.fmul(a, a), a)
        return emitter.intrinsic("llvm.pow", a, _known(a, float(exponent)))

    return _floats(emitter, spec, [x], compute)


def _where(emitter: Emitter, spec: TensorSpec, condition: Value, yes: Given, no: Given) -> Value:
    # The condition is a bool, the others have the result's dtype: brought into it one by one.
    chosen = [pointwise(emitter, spec.shape, spec.dtype, [v], lambda a: a) for v in (yes, no)]
    asked = pointwise(emitter, spec.shape, torch.bool, [condition], lambda a: a)
    steady, depth = asked.steady and all(c.steady for c in chosen), 1 + max(c.depth for c in (asked, *chosen))

    def at(index: list[Any]) -> Any:
        return emitter.select(asked.at(index), chosen[0].at(index), chosen[1].at(index))

    found = Value(tuple(spec.shape), spec.dtype, at, False, steady, depth=depth)
    return found if depth < _DEEPEST else remembered(emitter, found)


RULES.register("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")(_where)


@RULES.register("masked_fill.Scalar", "masked_fill.Tensor")
def _masked_fill(emitter: Emitter, spec: TensorSpec, x: Value, mask: Value, value: Given) -> Value:
    return _where(emitter, spec, mask, value, x)


@RULES.register("clamp")
def _clamp(emitter: Emitter, spec: TensorSpec, x: Value, low: Given | None = None, high: Given | None = None) -> Value:
    # A NaN is neither below nor above, so that it stays; one among the bounds comes in.
    def bounded(a: Any, bound: Any, sign: str) -> Any:
        builder = emitter.builder
        within = builder.or_(builder.fcmp_ordered(sign, a, bound), builder.fcmp_unordered("!=", a, a))
        return emitter.select(within, a, bound)

    value = _floats(emitter, spec, [x], lambda a: a)
    for bound, sign in ((low, ">="), (high, "<=")):
        if bound is not None:
            value = _floats(emitter, spec, [value, bound], lambda a, b, sign=sign: bounded(a, b, sign))
    return value


RULES.register("clamp_min")(_clamp)
RULES.register("clamp_max")(lambda emitter, spec, x, high: _clamp(emitter, spec, x, None, high))


def _rule_of_bools(compute: Callable[[Emitter, Any, Any], Any]) -> Callable[..., Value]:
    def rule(emitter: Emitter, spec: TensorSpec, x: Value, y: Value) -> Value:
        return pointwise(emitter, spec.shape, torch.bool, [x, y], lambda a, b: compute(emitter, a, b))

    return rule


for _words, _both in {
    ("logical_and", "bitwise_and.Tensor"): lambda e, a, b: e.builder.and_(a, b),
    ("logical_or", "bitwise_or.Tensor"): lambda e, a, b: e.builder.or_(a, b),
    ("logical_xor", "bitwise_xor.Tensor"): lambda e, a, b: e.builder.xor(a, b),
}.items():
    RULES.register(*_words)(_rule_of_bools(_both))


@RULES.register("logical_not", "bitwise_not")
def _not(emitter: Emitter, spec: TensorSpec, x: Value) -> Value:
    return pointwise(emitter, spec.shape, torch.bool, [x], lambda a: emitter.builder.not_(a))  # noqa: PLW0108 - of whichever builder then writes


@RULES.register("isnan")
def _is_nan(emitter: Emitter, spec: TensorSpec, x: Value) -> Value:
    compare = emitter.builder.fcmp_unordered
    return pointwise(emitter, spec.shape, torch.bool, [x], lambda a: compare("!=", a, a), x.dtype)


@RULES.register("_to_copy", "clone", "alias", "detach", "lift_fresh", "contiguous")
def _same(emitter: Emitter, spec: TensorSpec, x: Value, **_: Any) -> Value:
    return x if x.dtype is spec.dtype else pointwise(emitter, spec.shape, spec.dtype, [x], lambda a: a)


@RULES.register("zeros_like", "new_zeros", "zeros")
def _zeros(emitter: Emitter, spec: TensorSpec, *_: Any, **__: Any) -> Value:
    return constant(emitter, 0.0, spec.shape, _dtype(spec.dtype))


@RULES.register("ones_like", "new_ones", "ones")
def _ones(emitter: Emitter, spec: TensorSpec, *_: Any, **__: Any) -> Value:
    return constant(emitter, 1.0, spec.shape, _dtype(spec.dtype))


@RULES.register("full", "full_like", "new_full")
def _full(emitter: Emitter, spec: TensorSpec, _: Any, *rest: Any, **__: Any) -> Value:
    return pointwise(emitter, spec.shape, spec.dtype, [rest[-1]], lambda a: a)


@RULES.register("scalar_tensor")
def _scalar(emitter: Emitter, spec: TensorSpec, value: float, **_: Any) -> Value:
    return constant(emitter, value, spec.shape, _dtype(spec.dtype))


def _refused(what: str) -> Value:
    raise NoMachineFormError(what)
