"""Indexing: known indices move ranks as they move elements; unknown ones may reach anything along their dimensions."""

# ruff: noqa: ARG001 - rules share one signature

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.causal_rules.domain import NOTHING, Abstract, Value, squash, unknown
from fxjacobi.causal_rules.reductions import argument, reduced
from fxjacobi.causal_rules.registry import Context, rule
from fxjacobi.causal_rules.views import joined, moved
from fxjacobi.graph import TensorSpec, spec_of

if TYPE_CHECKING:
    from torch import fx

__all__: list[str] = []


def _spec(node: fx.Node) -> TensorSpec:
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    return spec


def _known_index(context: Context, index: Abstract) -> torch.Tensor | None:
    """Return the values of an index known in full, on the CPU."""
    if not index.constant or index.value is None:
        return None
    context.read(index)
    return index.value.cpu()


@rule("embedding")
def _embedding(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    weight, index = args[:2]
    rank = torch.maximum(index.rank.unsqueeze(-1), squash(reduced(weight.rank, 0, keepdim=False)))
    return Abstract(rank.expand(_spec(node).shape))


@rule("index_select")
def _index_select(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    base, dim, index = args
    known = _known_index(context, index)
    if known is not None:
        result: Value = moved(lambda tensor: tensor.index_select(dim, known.to(tensor.device)), base)
        return result
    shape = _spec(node).shape
    if not shape:
        return unknown((), max(base.highest, index.highest))
    placed = [1] * len(shape)
    placed[dim % len(shape)] = -1
    rank = torch.maximum(reduced(base.rank, dim, keepdim=True), index.rank.reshape(placed))
    return Abstract(rank.expand(shape))


@rule("gather", "take_along_dim")
def _gather(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    base = args[0]
    index = argument(node, "index", args, kwargs)
    index = argument(node, "indices", args, kwargs) if index is None else index
    dim = argument(node, "dim", args, kwargs)
    if dim is None or not base.shape or "take_along" in str(node.target):
        return context.give_up(node, args, kwargs)
    known = _known_index(context, index)
    if known is not None:
        result: Value = moved(lambda tensor: tensor.gather(dim, known.to(tensor.device)), base)
        return result
    highest = reduced(base.rank, dim, keepdim=True)
    region = tuple(slice(0, size if axis != dim % len(base.shape) else 1) for axis, size in enumerate(index.shape))
    return Abstract(torch.maximum(index.rank, highest[region]).expand(_spec(node).shape))


@rule("index.Tensor", "_unsafe_index.Tensor")
def _index(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    base, indices = args[0], list(args[1])
    given = [index for index in indices if index is not None]
    shape = _spec(node).shape
    known = [_known_index(context, index) for index in given]
    if all(index is not None for index in known):
        values = iter(known)
        full = [None if index is None else next(values) for index in indices]

        def select(tensor: torch.Tensor) -> torch.Tensor:
            chosen = [None if index is None else index.to(tensor.device) for index in full]
            found: torch.Tensor = torch.ops.aten.index.Tensor(tensor, chosen)
            return found

        result: Value = moved(select, base)
        return result
    if any(index.value is not None and index.value.dtype == torch.bool for index in given) or any(
        isinstance(spec_of(one), TensorSpec) and spec_of(one).dtype == torch.bool  # type: ignore[union-attr, arg-type]
        for one in node.args[1]  # type: ignore[union-attr]
        if one is not None
    ):
        return context.give_up(node, args, kwargs)
    dims = [dim for dim, index in enumerate(indices) if index is not None]
    rest = reduced(base.rank, dims, keepdim=False)
    block = torch.broadcast_shapes(*(index.shape for index in given))
    adjacent = dims == list(range(dims[0], dims[-1] + 1))
    start = dims[0] if adjacent else 0
    rank = torch.tensor(NOTHING, dtype=torch.int32)
    for index in given:
        rank = torch.maximum(rank, squash(index.rank))
    rank = rank.expand(block).reshape(*block, *[1] * (rest.dim() - start))
    for _ in block:
        rest = rest.unsqueeze(start)
    return Abstract(torch.maximum(rank, rest).expand(shape))


@rule("index_put", "_unsafe_index_put")
def _index_put(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    base, indices, value = args[0], list(args[1]), args[2]
    accumulate = bool(argument(node, "accumulate", args, kwargs))
    given = [index for index in indices if index is not None]
    known = [_known_index(context, index) for index in given]
    spec = _spec(node)
    if any(index is None for index in known):
        return unknown(spec.shape, max(one.highest for one in (base, value, *given)))
    values = iter(known)
    full = [None if index is None else next(values) for index in indices]

    def put(pair: list[torch.Tensor]) -> torch.Tensor:
        chosen = [None if index is None else index.to(pair[0].device) for index in full]
        found: torch.Tensor = torch.ops.aten.index_put(pair[0].clone(), chosen, pair[1])
        return found

    if not accumulate:
        return joined([base, value], put, spec.dtype)
    # Several values may fall on one element: all of them reach it.
    touched = put([torch.zeros(base.shape, dtype=torch.bool), torch.ones((), dtype=torch.bool)])
    return Abstract(torch.where(touched, torch.clamp(base.rank, min=value.highest), base.rank))


@rule("scatter.src", "scatter.value", "scatter_add", "scatter_reduce.two")
def _scatter(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    base, dim, index, source = args[:4]
    shape = _spec(node).shape
    if not shape:
        return context.give_up(node, args, kwargs)
    dim = dim % len(shape)
    plain = str(node.target) in ("aten.scatter.src", "aten.scatter.value")
    known = _known_index(context, index)
    if known is not None and plain:
        if not isinstance(source, Abstract):
            filled = torch.full((), source, dtype=_spec(node).dtype).expand(index.shape)
            rank = torch.tensor(NOTHING, dtype=torch.int32).expand(index.shape)
            source = Abstract(rank, torch.tensor(True).expand(index.shape), filled)

        def put(pair: list[torch.Tensor]) -> torch.Tensor:
            return pair[0].clone().scatter(dim, known.to(pair[0].device), pair[1])

        # Indices that collide write in an order of the kernel's own.
        counts = torch.zeros(shape, dtype=torch.int32).scatter_add(
            dim, known, torch.ones_like(known, dtype=torch.int32)
        )
        if int(counts.max()) <= 1:
            return joined([base, source], put, _spec(node).dtype)
    region = tuple(slice(0, size if axis != dim else None) for axis, size in enumerate(index.shape))
    reach = reduced(index.rank, dim, keepdim=True)
    if isinstance(source, Abstract):
        part = source.rank[tuple(slice(0, size) for size in index.shape)]
        reach = torch.maximum(reach, reduced(part, dim, keepdim=True))
    rank = base.rank.clone()
    rank[region] = torch.maximum(rank[region], reach)
    return Abstract(rank)


@rule("index_fill", "index_copy", "index_add")
def _index_write(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    base, dim, index, source = args[:4]
    shape = _spec(node).shape
    if not shape:
        return context.give_up(node, args, kwargs)
    rank = torch.maximum(base.rank, torch.tensor(index.highest, dtype=torch.int32))
    if isinstance(source, Abstract):
        reach = reduced(source.rank, dim, keepdim=True) if source.shape else source.rank
        rank = torch.maximum(rank, reach)
    return Abstract(rank.expand(shape))


@rule("one_hot")
def _one_hot(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    return Abstract(args[0].rank.unsqueeze(-1).expand(_spec(node).shape))


@rule("bucketize.Tensor", "searchsorted.Tensor")
def _search(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """A row of boundaries for each row of values (``searchsorted``), or one row for all (``bucketize``)."""
    boundaries, values = (args[0], args[1]) if "searchsorted" in str(node.target) else (args[1], args[0])
    sorter = argument(node, "sorter", args, kwargs)
    if sorter is not None:
        return context.give_up(node, args, kwargs)
    rank = torch.maximum(values.rank, squash(reduced(boundaries.rank, -1, keepdim=len(boundaries.shape) > 1)))
    return Abstract(rank.expand(_spec(node).shape))
