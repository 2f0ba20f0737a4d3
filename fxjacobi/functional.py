"""The functional spelling of operations that write in place, and of the views a write goes through."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fxjacobi.ops import Index

__all__ = ["Mutation", "basic_view_index", "functional_counterpart", "inverse_view", "mutation_of"]

aten = torch.ops.aten

_RENAMED = {"normal_": "normal_functional"}


@dataclass(frozen=True, slots=True)
class Mutation:
    """What an operation writes to: positions among its positional arguments, and keyword names."""

    positions: tuple[int, ...]
    keywords: tuple[str, ...]


@cache
def mutation_of(op: torch._ops.OpOverload) -> Mutation | None:
    """Return what ``op`` writes to, or ``None`` for an operation without side effects."""
    positions: list[int] = []
    keywords: list[str] = []
    for position, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            if argument.kwarg_only:
                keywords.append(argument.name)
            else:
                positions.append(position)
    return Mutation(tuple(positions), tuple(keywords)) if positions or keywords else None


def _signature(op: torch._ops.OpOverload, without: tuple[str, ...] = ()) -> tuple[tuple[str, str], ...]:
    return tuple((a.name, str(a.type)) for a in op._schema.arguments if a.name not in without)


@cache
def functional_counterpart(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """Return the overload that computes what ``op`` writes, without writing; ``None`` where ATen has none."""
    namespace, _, name = op._schema.name.partition("::")
    packet_name = _RENAMED.get(name, name.removesuffix("_"))
    packet = getattr(getattr(torch.ops, namespace), packet_name, None)
    if packet is None:
        return None
    mutation = mutation_of(op)
    wanted = _signature(op, without=mutation.keywords if mutation else ())
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        if mutation_of(candidate) is None and _signature(candidate) == wanted:
            found: torch._ops.OpOverload = candidate
            return found
    return None


def _dim(dim: int, rank: int) -> int:
    return dim if dim >= 0 else dim + rank


def basic_view_index(steps: list[tuple[Any, tuple[Any, ...], tuple[int, ...]]], shape: tuple[int, ...]) -> Index | None:
    """Combine selects and slices into one index of the base, or return ``None`` if another view is among them.

    Args:
        steps: From the base outwards: the view operation, its arguments after ``self``, and the viewed shape.
        shape: The base's shape.
    """
    entries: list[int | tuple[int, int, int] | None] = [None] * len(shape)
    dims = list(range(len(shape)))  # the base's dimension behind each dimension of the present view
    for op, args, viewed in steps:
        if op in (aten.detach.default, aten.alias.default):
            continue
        rank = len(viewed)
        if op is aten.select.int:
            dim, position = _dim(args[0], rank), args[1]
            position = position if position >= 0 else position + viewed[dim]
            entry = entries[dims[dim]]
            if isinstance(entry, tuple):
                position = entry[0] + position * entry[2]
            entries[dims.pop(dim)] = position
        elif op is aten.slice.Tensor:
            dim = _dim(args[0] if args else 0, rank)
            size = viewed[dim]
            start, stop, step = slice(
                args[1] if len(args) > 1 else None, args[2] if len(args) > 2 else None, args[3] if len(args) > 3 else 1
            ).indices(size)
            if (start, stop, step) == (0, size, 1):
                continue
            entry = entries[dims[dim]]
            if isinstance(entry, tuple):
                start, stop, step = entry[0] + start * entry[2], entry[0] + stop * entry[2], step * entry[2]
            entries[dims[dim]] = (start, stop, step)
        else:
            return None
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


def inverse_view(
    op: Any, args: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Any, tuple[Any, ...], bool] | None:
    """Return how to put a written view back into its parent of ``shape``.

    Returns:
        The operation, its trailing arguments, and whether it also takes the parent (a scatter) before the value;
        ``None`` where the view has no inverse (an expanded or overlapping one).
    """
    rank = len(shape)
    scatters = {
        aten.select.int: aten.select_scatter.default,
        aten.slice.Tensor: aten.slice_scatter.default,
        aten.diagonal.default: aten.diagonal_scatter.default,
        aten.as_strided.default: aten.as_strided_scatter.default,
    }
    if op in scatters:
        return scatters[op], args, True
    if op in (aten.detach.default, aten.alias.default):
        return aten.alias.default, (), False
    if op is aten.permute.default:
        order = [_dim(d, rank) for d in args[0]]
        return aten.permute.default, ([order.index(d) for d in range(rank)],), False
    if op is aten.transpose.int:
        return aten.transpose.int, args, False
    if op is aten.t.default:
        return aten.t.default, (), False
    if op in (
        aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.unsqueeze.default,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
    ):  # fmt: skip
        return aten.reshape.default, (list(shape),), False
    if op is aten.view.dtype:
        return aten.view.dtype, (dtype,), False
    if op is aten.view_as_real.default:
        return aten.view_as_complex.default, (), False
    if op is aten.view_as_complex.default:
        return aten.view_as_real.default, (), False
    return None
