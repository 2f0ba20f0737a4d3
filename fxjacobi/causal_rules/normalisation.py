"""Normalisations: layer, group and RMS norm mix what they average over; batch norm only while it trains."""

# ruff: noqa: ARG001 - rules share one signature

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.causal_rules.domain import Abstract, Value
from fxjacobi.causal_rules.pointwise import maximum_rank
from fxjacobi.causal_rules.reductions import argument, reduced
from fxjacobi.causal_rules.registry import Context, first_of, rule, tensors_in
from fxjacobi.graph import spec_of

if TYPE_CHECKING:
    from torch import fx

__all__: list[str] = []


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y)[..., i] = max_j r(x)[..., j]`` over the normalised dimensions, and what weight and bias rest on."""
    source, normalized = args[:2]
    dims = list(range(-len(normalized), 0))
    mixed = Abstract(reduced(source.rank, dims, keepdim=True))
    affine = tensors_in((args[2:], kwargs))
    return first_of(spec_of(node), maximum_rank([mixed, *affine], source.shape))


@rule("native_group_norm", "group_norm")
def _group_norm(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y)[b, c, :] = max r(x)[b, c', :]`` over the channels of c's group and all places."""
    source = args[0]
    groups = argument(node, "group", args, kwargs) or argument(node, "num_groups", args, kwargs)
    shape = source.shape
    grouped = source.rank.unflatten(1, (groups, shape[1] // groups))
    mixed = reduced(grouped, list(range(2, grouped.dim())), keepdim=True).expand(grouped.shape)
    rank = mixed.flatten(1, 2)
    for affine in tensors_in((args[1:], kwargs)):
        if affine.highest >= 0:
            rank = torch.clamp(rank, min=affine.highest)
    return first_of(spec_of(node), rank)


@rule(
    "native_batch_norm", "batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training", "_batch_norm_no_update",
    "_batch_norm_with_update", "_batch_norm_with_update_functional", "_native_batch_norm_legit.no_stats", "instance_norm",
    "_batch_norm_impl_index",
)  # fmt: skip
def _batch_norm(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y) = r(x)`` with given statistics; ``r(y)[:, c] = max r(x)[:, c]`` with the batch's own."""
    source = args[0]
    name = str(node.target)
    training = argument(node, "training", args, kwargs)
    if "instance_norm" in name or "_batch_norm_impl_index" in name:
        return context.give_up(node, args, kwargs)
    if training is None:
        training = "no_training" not in name and "no_update" not in name
    rank = source.rank
    if training:
        rank = reduced(rank, [dim for dim in range(rank.dim()) if dim != 1], keepdim=True).expand(rank.shape)
    for affine in tensors_in((args[1:], kwargs)):
        if affine.highest >= 0:
            rank = torch.clamp(rank, min=affine.highest)
    return first_of(spec_of(node), rank)
