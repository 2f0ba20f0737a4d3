"""Indexing: known indices move ranks as they move elements; unknown ones may reach anything along their dimensions."""

# ruff: noqa: ARG001 - rules share one signature

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.causal_rules.domain import NOTHING, Abstract, Value, broadcast, squash, unknown, without
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
    """``r(y)[i, :] = max(r(index)[i], max_v r(table)[v, :])``."""
    weight, index = args[:2]
    rank = torch.maximum(index.rank.unsqueeze(-1), squash(reduced(weight.rank, 0, keepdim=False)))
    return Abstract(rank.expand(_spec(node).shape))


@rule("index_select")
def _index_select(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y)[i] = r(x)[index_i]``; of an index that is not known, any place along the dimension, and what it rests on."""
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
    """``r(y)[i, j] = r(x)[index_ij, j]`` along the dimension; of an unknown index, the most of its column."""
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
    """``r(y)[i] = r(x)[index_i, ...]``; of unknown indices, the most along the dimensions that they index."""
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
    block = broadcast(*(index.shape for index in given))
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
    """``r(y) = r(x)`` but at the indices, where it is the value's; where several may fall on a place, the most."""
    base, indices, value = args[0], list(args[1]), args[2]
    accumulate = bool(argument(node, "accumulate", args, kwargs))
    given = [index for index in indices if index is not None]
    known = [_known_index(context, index) for index in given]
    spec = _spec(node)
    if any(index is None for index in known):
        return unknown(spec.shape, max(one.highest for one in (base, value, *given)))
    values = iter(known)
    full = [None if index is None else next(values) for index in indices]

    def put(pair: list[torch.Tensor], accumulate: bool = False) -> torch.Tensor:
        chosen = [None if index is None else index.to(pair[0].device) for index in full]
        found: torch.Tensor = torch.ops.aten.index_put(pair[0].clone(), chosen, pair[1], accumulate)
        return found

    counts = put([torch.zeros(base.shape, dtype=torch.int32), torch.ones((), dtype=torch.int32)], accumulate=True)
    if not accumulate and (not counts.numel() or int(counts.max()) <= 1):
        return joined([base, value], put, spec.dtype)
    # Several values may fall on one element: any of them may reach it, and sums are of all of them.
    reached = without(torch.tensor(value.highest, dtype=torch.int32), counts == 0)
    return Abstract(torch.maximum(base.rank, reached))


@rule("scatter.src", "scatter.value", "scatter_add", "scatter_reduce.two")
def _scatter(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y)[index_ij, j] = r(src)[i, j]`` along the dimension, elsewhere ``r(x)``; of unknown indices, the most of a column."""
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
    if known is not None and isinstance(source, Abstract):
        # Sums, products, or values that collide: every one of them may reach its place.
        part = source.rank[tuple(slice(0, size) for size in index.shape)].contiguous()
        return Abstract(base.rank.contiguous().scatter_reduce(dim, known, part, "amax"))
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
    """Slices along a dimension, added or replaced; of an unknown index they may fall anywhere."""
    base, dim, index, source = args[:4]
    shape = _spec(node).shape
    if not shape or not index.shape:
        return context.give_up(node, args, kwargs)
    known = _known_index(context, index)
    if known is not None:
        return _written(node, base, dim, known, source)
    rank = torch.maximum(base.rank, torch.tensor(index.highest, dtype=torch.int32))
    if isinstance(source, Abstract):
        reach = reduced(source.rank, dim, keepdim=True) if source.shape else source.rank
        rank = torch.maximum(rank, reach)
    return Abstract(rank.expand(shape))


def _written(node: fx.Node, base: Abstract, dim: int, index: torch.Tensor, source: object) -> Value:
    """Return ``base`` with slices along ``dim`` added to (``index_add``) or replaced, at places known in advance."""
    name = str(node.target)
    if "index_fill" in name:
        untouched = torch.ones(base.shape[dim], dtype=torch.bool).index_fill(0, index, False)
        placed = [1] * len(base.shape)
        placed[dim] = -1
        highest = source.highest if isinstance(source, Abstract) else NOTHING
        filled = torch.tensor(highest, dtype=torch.int32)
        return Abstract(torch.where(untouched.reshape(placed), base.rank, filled).expand(base.shape))
    assert isinstance(source, Abstract)
    part, rank = source.rank.expand(source.shape).contiguous(), base.rank.contiguous()
    if "index_copy" in name and len(index.unique()) == len(index):
        return Abstract(rank.index_copy(dim, index, part))
    placed = [1] * len(base.shape)
    placed[dim] = -1
    return Abstract(rank.scatter_reduce(dim, index.reshape(placed).expand(part.shape), part, "amax"))


@rule("one_hot")
def _one_hot(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y)[i, :] = r(index)[i]``."""
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
