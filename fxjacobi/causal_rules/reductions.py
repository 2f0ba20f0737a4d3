"""Reductions, scans and orderings: the maximum along the dimensions that are mixed."""

# ruff: noqa: ARG001 - rules share one signature

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.causal_rules.domain import NOTHING, Abstract, Value, squash
from fxjacobi.causal_rules.registry import Context, rule, tensors_in
from fxjacobi.graph import Spec, TensorSpec, spec_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

__all__ = ["argument", "reduced"]


def argument(node: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an argument of an ATen call by its name in the schema, or its default."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    for position, formal in enumerate(target._schema.arguments):
        if formal.name == name:
            if name in kwargs:
                return kwargs[name]
            if position < len(args) and not formal.kwarg_only:
                return args[position]
            return formal.default_value if formal.has_default_value() else None
    return None


def reduced(rank: torch.Tensor, dims: Sequence[int] | int | None, *, keepdim: bool) -> torch.Tensor:
    """Return the maximum along ``dims`` (``None`` or empty: all), keeping stride 0 elsewhere."""
    if rank.dim() == 0:
        return rank
    chosen = list(range(rank.dim())) if dims is None or dims == [] or dims == () else dims
    chosen = sorted({dim % rank.dim() for dim in ([chosen] if isinstance(chosen, int) else chosen)})
    shape = [1 if dim in chosen else size for dim, size in enumerate(rank.shape)]
    if rank.numel() == 0:
        found = torch.tensor(NOTHING, dtype=torch.int32).expand(shape)
    else:
        found = squash(rank).amax(chosen, keepdim=True).expand(shape)
    return found if keepdim else found.squeeze(chosen)


def _like(spec: Spec, rank: torch.Tensor) -> Value:
    """Give the same ranks to one result or several."""
    if isinstance(spec, TensorSpec):
        return Abstract(rank.expand(spec.shape) if rank.dim() <= len(spec.shape) else rank.reshape(spec.shape))
    assert isinstance(spec, tuple)
    return tuple(_like(item, rank) for item in spec)


@rule(
    "sum", "mean", "prod", "amax", "amin", "any", "all", "var", "std", "var_mean", "std_mean", "logsumexp", "norm",
    "linalg_vector_norm", "argmax", "argmin", "max", "max.dim", "min", "min.dim", "aminmax", "median", "median.dim",
    "nanmedian", "nanmedian.dim", "mode", "nansum", "nanmean", "count_nonzero", "_is_all_true", "_is_any_true",
    "kthvalue", "special_logsumexp",
)  # fmt: skip
def _reduce(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y) = max r(x)`` along the reduced dimensions."""
    if len(tensors_in((args, kwargs))) != 1:
        # max.other and min.other are pointwise.
        spec = spec_of(node)
        assert isinstance(spec, TensorSpec)
        rank = torch.maximum(squash(args[0].rank), squash(args[1].rank))
        return Abstract(rank.expand(spec.shape))
    dims = argument(node, "dim", args, kwargs)
    if str(node.target) in ("aten.mode.default", "aten.kthvalue.default") and dims is None:
        dims = -1
    keepdim = bool(argument(node, "keepdim", args, kwargs))
    return _like(spec_of(node), reduced(args[0].rank, dims, keepdim=keepdim))


def running(rank: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the running maximum along ``dim``."""
    shape = rank.shape
    if rank.dim() == 0:
        return rank
    dim = dim % rank.dim()
    if rank.stride(dim) == 0 or rank.shape[dim] <= 1:
        return rank
    return squash(rank).cummax(dim).values.expand(shape)


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "_cummax_helper")
def _scan(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y)[i] = max_{j <= i} r(x)[j]`` along the dimension."""
    return _like(spec_of(node), running(args[0].rank, argument(node, "dim", args, kwargs)))


@rule("sort", "sort.stable", "argsort", "msort", "topk")
def _order(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y)[i] = max_j r(x)[j]`` along the dimension: any element may come to any place."""
    dim = argument(node, "dim", args, kwargs)
    if dim is None:
        dim = 0 if "msort" in str(node.target) else -1
    return _like(spec_of(node), reduced(args[0].rank, dim, keepdim=True))
