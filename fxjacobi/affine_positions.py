"""Which elements a chain of selections takes at every step, without walking the chain once a step.

    X[:, t], X[..., i_t, j_t], y[:, a_t:b_t]:     positions[t] = offset[t] + pattern

Selecting and slicing by other numbers at each step moves a view and keeps its shape and strides, so one view of the
elements' indices and a vector of offsets say it all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_arg

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["affine_positions"]

aten = torch.ops.aten


def affine_positions(
    indices: torch.Tensor,
    moves: Sequence[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]],
    literals: Mapping[fx.Node, tuple[Any, ...]],
    trip_count: int,
) -> torch.Tensor | None:
    """Return ``(T, *shape)`` indices, or ``None`` where a move is of another kind (then each step has to be walked).

    Args:
        indices: The source's elements' own indices, dense.
        moves: ``(function, arguments after the tensor, keyword arguments)``; nodes among them stand for ``literals``.
        literals: The values of such nodes, one a step.
        trip_count: Number of steps, ``T``.
    """
    part, offsets = indices, torch.zeros(trip_count, dtype=torch.int64)
    for function, args, kwargs in moves:
        nodes: list[fx.Node] = []
        map_arg((args, kwargs), nodes.append)
        if any(node not in literals for node in nodes):
            return None
        if not nodes:
            moved = function(part, *args, **kwargs)
        elif function is aten.select.int and not kwargs and not isinstance(args[0], fx.Node):
            moved = _selected(part, args[0] % part.dim(), literals[args[1]], offsets)
        elif function is aten.slice.Tensor and not kwargs and not isinstance(args[0], fx.Node):
            moved = _sliced(part, args[0] % part.dim(), args[1:], literals, offsets)
        else:
            return None
        if moved is None or moved.untyped_storage().data_ptr() != indices.untyped_storage().data_ptr():
            return None
        part = moved
    return offsets.reshape(-1, *[1] * part.dim()) + part


def _selected(part: torch.Tensor, dim: int, values: Sequence[Any], offsets: torch.Tensor) -> torch.Tensor | None:
    size = part.shape[dim]
    chosen = torch.tensor(values[: len(offsets)])
    if chosen.is_floating_point() or not size or int(chosen.min()) < -size or int(chosen.max()) >= size:
        return None
    offsets += (chosen % size) * part.stride(dim)
    return part.select(dim, 0)


def _sliced(
    part: torch.Tensor,
    dim: int,
    bounds: tuple[Any, ...],
    literals: Mapping[fx.Node, tuple[Any, ...]],
    offsets: torch.Tensor,
) -> torch.Tensor | None:
    bounds = (*bounds, *(None, None, 1)[len(bounds) :])
    starts, lengths, step = [], set(), bounds[2]
    if isinstance(step, fx.Node):
        return None
    for number in range(len(offsets)):
        first, last = (literals[one][number] if isinstance(one, fx.Node) else one for one in bounds[:2])
        start, stop, _ = slice(first, last, step).indices(part.shape[dim])
        starts.append(start)
        lengths.add(len(range(start, stop, step)))
    if len(lengths) != 1:
        return None
    (length,) = lengths
    offsets += torch.tensor(starts) * part.stride(dim)
    return part.narrow(dim, 0, (length - 1) * step + 1 if length else 0)[
        (*[slice(None)] * dim, slice(None, None, step))
    ]
