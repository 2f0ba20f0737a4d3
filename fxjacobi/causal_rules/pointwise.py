"""Pointwise operations: the maximum of the ranks, with broadcasting, less what absorbing constants remove.

``mul`` with a known 0, ``add`` with a known -inf, ``and`` with a known ``False`` give a known element whatever the
other operand holds: so masks kill dependence. For floats that rests on the other operand being finite
(``0 * inf`` is NaN), which the solver checks at run time on the nodes given to :meth:`Context.kill`.
"""

# ruff: noqa: ARG001 - rules share one signature

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from fxjacobi.causal_rules.domain import NOTHING, Abstract, Value, constant, nothing, some, squash, unknown, without
from fxjacobi.causal_rules.registry import Context, rule, tensors_in
from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.rule_table import overloads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

__all__ = ["is_pointwise", "maximum_rank", "pointwise", "select_by"]

_POINTWISE = frozenset(
    overloads(
        "_to_copy", "clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "lift", "contiguous", "to", "type_as",
        "clamp", "clip", "hardtanh", "relu6", "silu", "gelu", "mish", "softplus",
        "logit", "special_logit", "nan_to_num", "float_power", "square", "erf", "erfinv", "special_erf", "isfinite",
        "isnan", "isinf", "positive", "conj", "resolve_conj", "resolve_neg", "real", "_conj", "isclose", "fmod",
        "remainder", "lerp", "addcmul", "addcdiv", "polar", "complex", "copysign", "where.ScalarOther", "where.ScalarSelf",
        "where.Scalar", "special_xlog1py", "xlogy", "log_sigmoid_forward", "log_sigmoid", "_prelu_kernel",
        "rsub", "heaviside", "special_ndtr", "special_ndtri", "special_log_ndtr",
    )
)  # fmt: skip

_DIVISIONS = frozenset(overloads("div", "true_divide", "divide", "reciprocal", "rsqrt", "pow", "atan2", "copysign"))
_DIVISIONS |= frozenset(overloads("remainder", "fmod", "floor_divide", "addcdiv", "signbit", "float_power"))
"""Operations that tell 0 from -0, so that a zero left by ``0 * x`` is not a constant to them."""


def is_pointwise(target: object) -> bool:
    """Whether an element of the result reads the elements at its own place alone."""
    if target in _POINTWISE:
        return True
    return (
        isinstance(target, torch._ops.OpOverload)
        and torch.Tag.pointwise in target.tags
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def maximum_rank(tensors: Sequence[Abstract], shape: Sequence[int]) -> torch.Tensor:
    """Return the elementwise maximum of the ranks, broadcast to ``shape`` (stride 0 kept)."""
    rank: torch.Tensor | None = None
    for tensor in tensors:
        one = squash(tensor.rank)
        # Most operands are constants, parameters or scalars: a rank of -1 for all of them.
        if one.numel() == 1 and int(one) == NOTHING:
            continue
        rank = one if rank is None else torch.maximum(rank, one)
    return nothing(shape) if rank is None else rank.expand(tuple(shape))


def pointwise(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Apply the rule of any pointwise operation without absorbing constants."""
    tensors = tensors_in((args, kwargs))
    spec = spec_of(node)
    if not isinstance(spec, TensorSpec):
        if not isinstance(spec, tuple):
            return None
        highest = max((tensor.highest for tensor in tensors), default=NOTHING)
        return tuple(unknown(one.shape, highest) if isinstance(one, TensorSpec) else None for one in spec)
    rank = maximum_rank(tensors, spec.shape)
    if not tensors or any(tensor.known is None for tensor in tensors):
        return Abstract(rank)
    known = torch.tensor(True)
    for tensor in tensors:
        assert tensor.known is not None
        known = known & squash(tensor.known)
    if not some(known):
        return Abstract(rank)
    if node.target in _DIVISIONS:
        for tensor in tensors:
            zero = tensor.equals(0)
            if zero is not None:
                known = known & ~squash(zero)
                rank = torch.where(zero.expand(tuple(spec.shape)), context.top, rank)

    def concrete(item: object) -> object:
        return squash(item.value) if isinstance(item, Abstract) and item.value is not None else item

    is_leaf = lambda item: isinstance(item, Abstract)  # noqa: E731
    value = node.target(*tree_map(concrete, args, is_leaf=is_leaf), **tree_map(concrete, kwargs, is_leaf=is_leaf))  # type: ignore[operator]
    sources = frozenset().union(*(tensor.sources for tensor in tensors))
    return Abstract(rank, known.expand(tuple(spec.shape)), value.expand(tuple(spec.shape)), sources)


def select_by(
    context: Context, choice: Abstract, yes: Abstract, no: Abstract, shape: Sequence[int], dtype: torch.dtype
) -> Abstract:
    """Return ``where(choice, yes, no)``: where the choice is known, only the chosen side counts."""
    shape = tuple(shape)
    every = maximum_rank([choice, yes, no], shape)
    true, false = choice.equals(1), choice.equals(0)
    rank = every
    known = torch.tensor(False)
    context.read(choice)
    for chosen, side in ((true, yes), (false, no)):
        if chosen is not None:
            chosen = squash(chosen)
            one = squash(side.rank)
            if one.numel() == 1 and int(one) == NOTHING:
                rank = without(squash(rank), chosen)
            else:
                rank = torch.where(chosen, one, squash(rank))
            if side.known is not None:
                known = known | (chosen & squash(side.known))
    rank = rank.expand(shape)
    if not some(known):
        return Abstract(rank)
    device = next((one.value.device for one in (yes, no, choice) if one.value is not None), torch.device("cpu"))
    picked = squash(true).to(device) if true is not None else torch.tensor(False, device=device)
    zero = torch.zeros((), dtype=dtype, device=device)
    left = squash(yes.value).to(dtype) if yes.value is not None else None
    right = squash(no.value).to(dtype) if no.value is not None else None
    if left is None or right is None:
        # What is known comes from one side.
        value = left if left is not None else zero if right is None else right
    else:
        value = torch.where(picked, left, right)
    return Abstract(rank, known.expand(shape), value.expand(shape), choice.sources | yes.sources | no.sources)


def _as_abstract(item: object, dtype: torch.dtype) -> Abstract:
    if isinstance(item, Abstract):
        return item
    value = torch.tensor(item, dtype=dtype)
    return constant(value)


@rule("where.self")
def _where(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """See :func:`select_by`."""
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    choice, yes, no = args
    return select_by(
        context, choice, _as_abstract(yes, spec.dtype), _as_abstract(no, spec.dtype), spec.shape, spec.dtype
    )


@rule("masked_fill")
def _masked_fill(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``where(mask, value, x)``: see :func:`select_by`."""
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    base, mask, value = args
    return select_by(context, mask, _as_abstract(value, spec.dtype), base, spec.shape, spec.dtype)


def _absorb(
    context: Context,
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    absorbing: Sequence[tuple[int, float, float]],
) -> Value:
    """Apply the pointwise rule, then make known every element that an operand decides alone.

    ``absorbing`` lists ``(argument position, its value, the result's)``.
    """
    plain = pointwise(context, node, args, kwargs)
    if not isinstance(plain, Abstract) or not context.may_kill:
        return plain
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    rank, known, value, sources = plain.rank, plain.known, plain.value, plain.sources
    for position, operand_value, result_value in absorbing:
        operand = args[position]
        found = operand.equals(operand_value) if isinstance(operand, Abstract) else None
        if found is None:
            continue
        decided = squash(found)
        if known is not None:
            decided = decided & ~squash(known)
        if known is not None and not some(decided):
            continue
        if spec.dtype.is_floating_point or spec.dtype.is_complex:
            context.kill(node, operand)
        else:
            context.read(operand)
        rank = without(squash(rank), decided).expand(spec.shape)
        device = operand.value.device
        new = torch.tensor(result_value, dtype=spec.dtype, device=device)
        value = (new if value is None else torch.where(decided.to(device), new, squash(value))).expand(spec.shape)
        known = (decided if known is None else decided | squash(known)).expand(spec.shape)
        sources = sources | operand.sources
    return Abstract(rank, known, value, sources)


@rule("mul", "multiply")
def _mul(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``0 x = 0``."""
    return _absorb(context, node, args, kwargs, [(0, 0, 0), (1, 0, 0)])


@rule("div", "divide", "true_divide")
def _div(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``0 / x = 0``; a known zero divisor absorbs nothing."""
    divisor = args[1]
    if isinstance(divisor, Abstract) and divisor.equals(0) is not None:
        return pointwise(context, node, args, kwargs)
    return _absorb(context, node, args, kwargs, [(0, 0, 0)])


_INF = float("inf")


@rule("add.Tensor", "add.Scalar")
def _add(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``-inf + x = -inf``, ``inf + x = inf``."""
    if kwargs.get("alpha", 1) != 1 or not _floating(node):
        return pointwise(context, node, args, kwargs)
    ends = [(position, end, end) for position in (0, 1) for end in (-_INF, _INF)]
    return _absorb(context, node, args, kwargs, ends)


@rule("sub.Tensor", "sub.Scalar")
def _sub(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``-inf - x = -inf``, ``x - inf = -inf``, and with the signs turned."""
    if kwargs.get("alpha", 1) != 1 or not _floating(node):
        return pointwise(context, node, args, kwargs)
    ends = [(0, -_INF, -_INF), (0, _INF, _INF), (1, _INF, -_INF), (1, -_INF, _INF)]
    return _absorb(context, node, args, kwargs, ends)


def _floating(node: fx.Node) -> bool:
    spec = spec_of(node)
    return isinstance(spec, TensorSpec) and spec.dtype.is_floating_point


@rule("logical_and", "bitwise_and.Tensor", "__and__.Tensor", operator.and_)
def _and(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``False and x = False``."""
    return _absorb(context, node, args, kwargs, [(0, 0, 0), (1, 0, 0)])


@rule("logical_or")
def _or(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``True or x = True``."""
    return _absorb(context, node, args, kwargs, [(0, 1, 1), (1, 1, 1)])


@rule("glu")
def _glu(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y) = max(r(a), r(b))`` of the two halves along the dimension."""
    dim = args[1] if len(args) > 1 else -1
    first, second = args[0].rank.chunk(2, dim)
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    return Abstract(maximum_rank([Abstract(first), Abstract(second)], spec.shape))


@rule("item", "_local_scalar_dense")
def _item(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """A Python number is the same at every place: nothing may depend on a written position through it."""
    return context.give_up(node, args, kwargs) if args[0].highest >= 0 else unknown(())
