"""Softmax and attention: entries masked with -inf have weight exactly zero and carry no dependence.

``softmax(s)[i, j]`` is 0 where ``s[i, j]`` is known to be -inf and some other entry of row i is not;
``attention(Q, K, V)[i]`` depends on ``Q[i]`` and, for j not masked, on ``K[j]`` and ``V[j]`` (arXiv 1706.03762,
section 3.2).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.attention_names import ATTENTION
from fxjacobi.causal_rules.domain import NOTHING, Abstract, Value, every, some, squash, without
from fxjacobi.causal_rules.finite_masks import vanishing_keys, vanishing_logits
from fxjacobi.causal_rules.matmul import masked_maximum
from fxjacobi.causal_rules.pointwise import maximum_rank
from fxjacobi.causal_rules.reductions import argument, reduced, running
from fxjacobi.causal_rules.registry import Context, first_of, rule, tensors_in
from fxjacobi.graph import TensorSpec, spec_of

if TYPE_CHECKING:
    from torch import fx

__all__ = ["attention_rank", "masked_entries"]

_MINUS_INF = float("-inf")
_ALIGNS_LAST = re.compile(r"(flash_attention|efficient_attention|cudnn_attention|overrideable)\.")


@rule("_softmax", "softmax.int", "_safe_softmax", "_log_softmax", "log_softmax.int")
def _softmax(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y)[i, j] = max_k r(x)[i, k]`` over the entries k of row i that are not masked; -1 (known 0) at those that are."""
    source = args[0]
    dim = argument(node, "dim", args, kwargs)
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    if not spec.shape:
        return Abstract(source.rank)
    vanishing = vanishing_logits(context, node, node.args[0], dim)
    masked = source.equals(_MINUS_INF) if context.may_kill else None
    if masked is not None:
        # A row of nothing but -inf is NaN (or 0) altogether, and is no constant zero.
        masked = squash(masked)
        whole = masked if masked.shape[dim] != 1 else masked.expand(spec.shape)
        masked = masked & ~squash(_all(whole, dim))
        masked = masked if some(masked) else None
    rank, log = source.rank, "log" in str(node.target)
    if vanishing is not None:
        # What vanishes adds an exact zero to the row's sum.
        rank = without(squash(rank), vanishing).expand(spec.shape)
    rank = reduced(rank, dim, keepdim=True).expand(spec.shape)
    if log:
        # log(0) is not what log_softmax returns there: l - log sum exp(l).
        rank = (
            rank
            if vanishing is None
            else torch.where(vanishing, maximum_rank([source, Abstract(rank)], spec.shape), rank)
        )
    elif vanishing is not None:
        masked = vanishing if masked is None else masked | vanishing
    if vanishing is not None or masked is not None:
        context.kill(node, source)
    if masked is None:
        return Abstract(rank)
    value = torch.full((), _MINUS_INF if log else 0.0, dtype=spec.dtype, device=spec.device).expand(spec.shape)
    return Abstract(without(squash(rank), masked).expand(spec.shape), masked.expand(spec.shape), value, source.sources)


def _all(mask: torch.Tensor, dim: int) -> torch.Tensor:
    return mask.view(torch.uint8).amin(dim, keepdim=True).to(torch.bool)


def masked_entries(mask: Abstract | None) -> torch.Tensor | None:
    """Return where an attention mask is known to exclude: ``False`` in a bool mask, ``-inf`` in an added one."""
    if mask is None or mask.value is None:
        return None
    return mask.equals(0) if mask.value.dtype == torch.bool else mask.equals(_MINUS_INF)


def attention_rank(
    context: Context,
    node: fx.Node,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    causal: bool,
    mask: Abstract | None,
    vanishing: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return ranks of ``(..., L, 1)``: row i over its own query and the keys and values it may see.

    Ranks come in as ``(..., L, E)``, ``(..., S, E)``, ``(..., S, Ev)``; ``vanishing`` says where a finite mask excludes.
    """
    rows, columns = query.shape[-2], key.shape[-2]
    own = squash(query).amax(-1, keepdim=True)
    seen = torch.maximum(squash(key).amax(-1, keepdim=True), squash(value).amax(-1, keepdim=True))
    dead = masked_entries(mask)
    if causal:
        # With more keys than queries, kernels of CUDA align the triangle with the last key, others with the first.
        later = max(0, columns - rows) if _ALIGNS_LAST.search(str(node.target)) else 0
        upper = torch.ones(rows, columns, dtype=torch.bool).triu(1 + later)
        dead = upper if dead is None else dead | upper
    if vanishing is not None:
        dead = vanishing if dead is None else dead | vanishing
    if mask is not None and mask.highest >= 0:
        own = torch.maximum(own, squash(reduced(mask.rank, -1, keepdim=True)))
    if dead is None or not context.may_kill:
        return torch.maximum(own, seen.amax(-2, keepdim=True))
    # What a kernel gives for a row that sees nothing is its own affair: let it depend on everything.
    dead = squash(dead) if dead.stride(-1) else dead
    alive = ~dead | _all(dead, -1)
    if not every(alive):
        context.kill(node, *([] if mask is None else [mask]))
    seen = seen.expand(*seen.shape[:-2], columns, 1)
    return torch.maximum(own, masked_maximum(seen.mT.contiguous(), alive.mT).mT)


@rule(*ATTENTION)
def _attention(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """See :func:`attention_rank`; log-sum-exps and other results may depend on everything."""
    if argument(node, "dropout_p", args, kwargs) or argument(node, "dropout_mask", args, kwargs) is not None:
        return context.give_up(node, args, kwargs)
    query, key, value = args[:3]
    mask = argument(node, "attn_mask", args, kwargs)
    mask = argument(node, "attn_bias", args, kwargs) if mask is None else mask
    ranks = [query.rank, key.rank, value.rank]
    if query.shape[:-2] != key.shape[:-2]:
        # Grouped queries: each key head serves several query heads.
        if query.shape[-3] % key.shape[-3]:
            return context.give_up(node, args, kwargs)
        times = query.shape[-3] // key.shape[-3]
        ranks[1:] = [rank.repeat_interleave(times, -3) for rank in ranks[1:]]
    causal = bool(argument(node, "is_causal", args, kwargs))
    vanishing = None
    if mask is not None:
        name = "attn_mask" if argument(node, "attn_mask", args, kwargs) is not None else "attn_bias"
        bias = argument(node, name, node.args, node.kwargs)
        scale = argument(node, "scale", args, kwargs)
        vanishing = vanishing_keys(context, node, node.args[0], node.args[1], bias, scale)
    rank = attention_rank(context, node, *ranks, causal=causal, mask=mask, vanishing=vanishing)
    return first_of(spec_of(node), rank)


def _weights_rank(values: list[Abstract]) -> torch.Tensor:
    return torch.tensor(max((value.highest for value in values), default=NOTHING), dtype=torch.int32)


def _self_attention(
    context: Context, node: fx.Node, source: list[Abstract], mask: Abstract | None, mask_type: int | None
) -> torch.Tensor:
    """Rank ``(B, L, 1)`` of attention over whole tokens, with the mask conventions of the fused kernels.

    ``mask_type`` 0 is ``(L, L)``, 1 is key padding ``(B, L)``, 2 is ``(B, heads, L, L)``. The kernels turn masks into
    bools, so that every entry other than 0 excludes, -1e9 as well as -inf.
    """
    query, key, value = (one.rank for one in source)
    if mask is not None and mask.value is not None and mask.known is not None:
        mask = Abstract(mask.rank, mask.known, mask.value == 0, mask.sources)
    if mask is not None and mask_type == 1:
        mask = Abstract(
            mask.rank.unsqueeze(-2),
            None if mask.known is None else mask.known.unsqueeze(-2),
            None if mask.value is None else mask.value.unsqueeze(-2),
            mask.sources,
        )
    if mask is not None and len(mask.shape) == 4:
        # The heads are mixed by the output projection: an entry is excluded where every head excludes it.
        known = None if mask.known is None else mask.known.all(1)
        value_of = None if mask.value is None else mask.value.any(1)
        mask = Abstract(reduced(mask.rank, 1, keepdim=False), known, value_of, mask.sources)
    return attention_rank(context, node, query, key, value, causal=False, mask=mask)


@rule("_native_multi_head_attention")
def _multi_head(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Attention over whole tokens: the projections mix all features of a token, the heads are mixed by the last."""
    query, key, value = args[:3]
    mask = argument(node, "mask", args, kwargs)
    mask_type = argument(node, "mask_type", args, kwargs)
    weights = tensors_in(args[5:9])
    rank = _self_attention(context, node, [query, key, value], mask, mask_type)
    rank = torch.maximum(rank, _weights_rank(weights))
    spec = spec_of(node)
    assert isinstance(spec, tuple)
    out = spec[0]
    assert isinstance(out, TensorSpec)
    highest = squash(rank).amax()
    second = spec[1] if len(spec) > 1 else None
    attention = Abstract(highest.expand(second.shape)) if isinstance(second, TensorSpec) else None
    return (Abstract(rank.expand(out.shape)), attention)


@rule("_transformer_encoder_layer_fwd")
def _encoder_layer(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Attention over whole tokens, then a perceptron and norms token by token, with residual connections."""
    source = args[0]
    mask = argument(node, "mask", args, kwargs)
    mask_type = argument(node, "mask_type", args, kwargs)
    rank = _self_attention(context, node, [source] * 3, mask, mask_type)
    rank = torch.maximum(rank, squash(source.rank).amax(-1, keepdim=True))
    rank = torch.maximum(rank, _weights_rank(tensors_in([value for value in args[1:] if value is not mask])))
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    return Abstract(rank.expand(spec.shape))


@rule("mkldnn_rnn_layer")
def _rnn_layer(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """A recurrent layer over time (dimension 0): a running maximum, from the end where it runs backwards."""
    source = args[0]
    reverse, batch_sizes = args[7], args[8]
    spec = spec_of(node)
    if batch_sizes or not isinstance(spec, tuple) or not isinstance(spec[0], TensorSpec):
        return context.give_up(node, args, kwargs)
    rank = reduced(source.rank, -1, keepdim=True)
    rank = running(rank.flip(0), 0).flip(0) if reverse else running(rank.contiguous(), 0)
    rank = torch.maximum(rank, _weights_rank(tensors_in(args[1:])))
    return first_of(spec, maximum_rank([Abstract(rank)], rank.shape))
