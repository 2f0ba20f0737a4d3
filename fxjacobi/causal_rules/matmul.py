"""Matrix products: the maximum over the entries that are not exactly zero.

    rank(A @ B)[i, n] = max over k with A[i, k], B[k, n] not known zeros of max(rank A[i, k], rank B[k, n])

so a masked weight proves itself (MADE, arXiv 1502.03509), as do masked attention weights.
"""

# ruff: noqa: ARG001 - rules share one signature

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.causal_rules.domain import NOTHING, Abstract, Value, broadcast, every, nothing, squash, without
from fxjacobi.causal_rules.pointwise import maximum_rank, pointwise
from fxjacobi.causal_rules.registry import Context, rule, tensors_in
from fxjacobi.graph import TensorSpec, spec_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

__all__ = ["masked_maximum", "product_rank"]

_CHUNK = 1 << 24
_MANY = 1 << 22


def masked_maximum(rank: torch.Tensor, alive: torch.Tensor | None) -> torch.Tensor:
    """Return ``out[..., i, n] = max over k with alive[..., k, n] of rank[..., i, k]`` (``-1`` over nothing), squashed.

    ``alive`` ``None`` means all. Columns of ``alive`` that are equal are computed once.
    """
    constant_k = rank.stride(-1) == 0 or rank.shape[-1] == 1
    rank = squash(rank)
    if alive is None:
        return rank.amax(-1, keepdim=True)
    if constant_k:
        column = squash(alive)
        column = column.view(torch.uint8).amax(-2, keepdim=True) if alive.shape[-2] else column.new_zeros(1)
        return (rank[..., :1] - NOTHING) * column + NOTHING
    size = alive.shape[-2]
    if rank.shape[-1] != size:
        rank = rank.expand(*rank.shape[:-1], size)
    alive = squash(alive)
    if alive.shape[-2] != size:
        alive = alive.expand(*alive.shape[:-2], size, alive.shape[-1])
    if every(alive):
        return rank.amax(-1, keepdim=True)
    if rank.numel() == 0:
        batch = broadcast(rank.shape[:-2], alive.shape[:-2])
        return rank.new_zeros(*batch, rank.shape[-2], alive.shape[-1])
    inverse = None
    if alive.dim() == 2 and rank.numel() * alive.shape[-1] > _MANY:
        alive, inverse = torch.unique(alive, dim=1, return_inverse=True)
    rows = rank.shape[-2]
    step = max(1, min(rows, _CHUNK // max(1, size * alive.shape[-1])))
    # max over k of alive * (rank + 1), less 1: in 16 bits where the ranks allow it, for the bytes are what costs.
    narrow = torch.int16 if int(rank.max()) < torch.iinfo(torch.int16).max else torch.int32
    counts, live = (rank - NOTHING).to(narrow), alive.view(torch.uint8).unsqueeze(-3)
    parts = [(live * counts[..., start : start + step, :].unsqueeze(-1)).amax(-2) for start in range(0, rows, step)]
    result = (torch.cat(parts, -2) if len(parts) > 1 else parts[0]).to(torch.int32) + NOTHING
    return result if inverse is None else result[..., inverse]


def product_rank(context: Context, node: fx.Node, left: Abstract, right: Abstract, shape: Sequence[int]) -> Abstract:
    """Return the rank of ``left @ right`` (``(..., I, K) @ (..., K, N)``), of the given result shape."""
    dead_left = left.equals(0) if context.may_kill else None
    dead_right = right.equals(0) if context.may_kill else None
    if left.shape[-1] == 0:
        return Abstract(nothing(shape))
    ranks = []
    if left.highest >= 0:
        ranks.append(masked_maximum(left.rank, None if dead_right is None else ~dead_right))
        if dead_right is not None:
            context.kill(node, right)
    if right.highest >= 0:
        ranks.append(masked_maximum(right.rank.mT, None if dead_left is None else ~dead_left.mT).mT)
        if dead_left is not None:
            context.kill(node, left)
    if not ranks:
        return Abstract(nothing(shape))
    return Abstract((ranks[0] if len(ranks) == 1 else torch.maximum(*ranks)).expand(tuple(shape)))


def _shape(node: fx.Node) -> tuple[int, ...]:
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    return spec.shape


@rule("mm", "bmm", "matmul")
def _matmul(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(A B)``: see :func:`product_rank`."""
    return _product_of(context, node, args[0], args[1], _shape(node))


def _product_of(context: Context, node: fx.Node, left: Abstract, right: Abstract, shape: tuple[int, ...]) -> Abstract:
    """Handle vectors as ``torch.matmul`` does."""
    if len(left.shape) == 1:
        grown = _product_of(context, node, _unsqueezed(left, 0), right, (*shape[:-1], 1, *shape[-1:]))
        return Abstract(grown.rank.reshape(shape))
    if len(right.shape) == 1:
        grown = product_rank(context, node, left, _unsqueezed(right, 1), (*shape, 1))
        return Abstract(grown.rank.reshape(shape))
    return product_rank(context, node, left, right, shape)


def _unsqueezed(value: Abstract, dim: int) -> Abstract:
    if value.known is None or value.value is None:
        return Abstract(value.rank.unsqueeze(dim))
    return Abstract(value.rank.unsqueeze(dim), value.known.unsqueeze(dim), value.value.unsqueeze(dim), value.sources)


@rule("mv", "dot", "vdot", "inner")
def _vector(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Products of vectors, as matrices of one row or column."""
    left, right = args
    if len(right.shape) != 1 or len(left.shape) > 2:
        return context.give_up(node, args, kwargs)
    return _product_of(context, node, left, right, _shape(node))


@rule("addmm", "baddbmm", "addbmm", "addmv")
def _addmm(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``max(r(base), r(A B))``; where the base is known to be -inf or inf, the sum is too."""
    base, left, right = args[:3]
    shape = _shape(node)
    if node.target is torch.ops.aten.addbmm.default:
        return context.give_up(node, args, kwargs)
    product = _product_of(context, node, left, right, shape)
    ends = [base.equals(end) for end in (float("-inf"), float("inf"))] if kwargs.get("beta", 1) == 1 else []
    rank = maximum_rank([base, product], shape)
    known = None
    for end in ends:
        if end is not None and context.may_kill:
            # -inf + x is -inf: an additive mask fused into the product (nn.MultiheadAttention).
            known = end if known is None else known | end
            context.kill(node, base)
    if known is None:
        return Abstract(rank)
    known = squash(known).expand(shape)
    return Abstract(without(rank, known), known, base.value.expand(shape), base.sources)


@rule("linear")
def _linear(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``max(r(x W^T), r(bias))``."""
    source, weight = args[:2]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    transposed = Abstract(
        weight.rank.mT,
        None if weight.known is None else weight.known.mT,
        None if weight.value is None else weight.value.mT,
        weight.sources,
    )
    product = _product_of(context, node, source, transposed, _shape(node))
    return product if bias is None else Abstract(maximum_rank([product, bias], _shape(node)))


@rule("_weight_norm_interface")
def _weight_norm(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``v * (g / norm(v))``: no dependence between outputs beyond each slice along ``dim``; zeros of v stay zeros."""
    direction, magnitude = args[:2]
    spec = spec_of(node)
    assert isinstance(spec, tuple)
    shape = direction.shape
    if max(tensor.highest for tensor in tensors_in(args)) >= 0:
        return context.give_up(node, args, kwargs)
    zero = direction.equals(0) if context.may_kill else None
    weight = Abstract(nothing(shape))
    if zero is not None:
        context.kill(node, direction)
        blank = torch.zeros((), dtype=direction.value.dtype, device=direction.value.device).expand(shape)
        weight = Abstract(weight.rank, zero, blank, direction.sources)
    return (weight, Abstract(magnitude.rank))


@rule("einsum")
def _einsum(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y)[o] = max over the summed letters of max over operands of r``, where no operand is a known zero."""
    equation, operands = args[0].replace(" ", ""), list(args[1])
    if "->" not in equation or "." in equation:
        return context.give_up(node, args, kwargs)
    inputs, output = equation.split("->")
    terms = inputs.split(",")
    if any(len(set(term)) != len(term) for term in terms):
        return context.give_up(node, args, kwargs)
    letters = [*output, *sorted({letter for term in terms for letter in term if letter not in output})]
    rank = torch.tensor(NOTHING, dtype=torch.int32)
    dead = torch.tensor(False)
    for term, operand in zip(terms, operands, strict=True):
        order = [term.index(letter) for letter in letters if letter in term]
        where = tuple(slice(None) if letter in term else None for letter in letters)
        rank = torch.maximum(rank, squash(operand.rank.permute(order)[where]))
        zero = operand.equals(0) if context.may_kill else None
        if zero is not None:
            context.kill(node, operand)
            dead = dead | squash(zero.permute(order)[where])
    rank = without(rank, dead)
    inner = tuple(range(len(output), len(letters)))
    if inner:
        rank = rank.amax(inner) if rank.dim() == len(letters) else rank
    return Abstract(rank.expand(_shape(node)))


@rule("addcmul")
def _addcmul(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``max(r(x), r(a), r(b))``, with broadcasting."""
    return pointwise(context, node, args, kwargs)
