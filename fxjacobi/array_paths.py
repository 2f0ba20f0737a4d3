"""Ways into a tensor: the part that a write covers, the part that a chain of views selects, at each step of a loop."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx
from torch.fx.node import map_arg

from fxjacobi import ops
from fxjacobi.affine_positions import affine_positions
from fxjacobi.causal_rules.views import VIEWS
from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.rule_table import overloads

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NotAnArrayLoop", "Path", "Region", "numel", "positions_of", "selection", "write_chain", "written_part"]

aten = torch.ops.aten

_RESHAPES = frozenset(overloads("view.default", "_unsafe_view", "reshape", "view_copy.default", "_reshape_alias"))

Path: TypeAlias = "tuple[fx.Node | Region, ...]"


class NotAnArrayLoop(Exception):  # noqa: N818 - an answer, caught by the only caller
    """The loop is not of this form; the message says in what, and ``node`` is the place, if there is one."""

    def __init__(self, message: str, node: fx.Node | None = None) -> None:
        super().__init__(message)
        self.node = node


@dataclass(frozen=True, slots=True)
class Region:
    """The part of a base that a write covers: ``operation(base, *arguments)`` is that part."""

    operation: Any
    arguments: tuple[Any, ...]


def numel(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape."""
    total = 1
    for size in shape:
        total *= size
    return total


def written_part(node: fx.Node) -> tuple[fx.Node, Any, Path] | None:
    """Return ``(base, value, path to the written part)`` if ``node`` is a write."""
    if node.op != "call_function":
        return None
    if node.target is ops.write:
        base, value, index = node.args
        assert isinstance(base, fx.Node)
        return base, value, (Region(_basic, (index,)),)
    scatters = {
        aten.select_scatter.default: (aten.select.int, 2),
        aten.slice_scatter.default: (aten.slice.Tensor, 2),
        aten.diagonal_scatter.default: (aten.diagonal.default, 2),
    }
    if node.target in scatters:
        operation, first = scatters[node.target]
        base, value = node.args[:2]
        assert isinstance(base, fx.Node)
        region = Region(operation, tuple(node.args[first:]))
        if isinstance(value, fx.Node):
            inner = written_part(value)
            # X[..., i, j] = v comes out as a scatter into the selected row, scattered back.
            if inner is not None and inner[0].target is operation and inner[0].args == (base, *node.args[first:]):
                return base, inner[1], (region, *inner[2])
        return base, value, (region,)
    if node.target is aten.index_put.default and not (len(node.args) > 3 and node.args[3]):
        base, index, value = node.args[:3]
        assert isinstance(base, fx.Node)
        return base, value, (Region(aten.index.Tensor, (index,)),)
    return None


def _written_as_seen(node: fx.Node) -> tuple[fx.Node, Any, Path] | None:
    """Return the parts of a write through another shape: ``base.view(...)`` is written to, and seen as ``base`` again."""
    inner = node.args[0] if node.target in _RESHAPES else None
    write = written_part(inner) if isinstance(inner, fx.Node) and len(inner.users) == 1 else None
    if write is None or write[0].target not in _RESHAPES:
        return None
    seen, base = write[0], write[0].args[0]
    assert isinstance(base, fx.Node)
    old, new = spec_of(base), spec_of(node)
    if (
        not isinstance(old, TensorSpec)
        or not isinstance(new, TensorSpec)
        or (old.shape, old.dtype) != (new.shape, new.dtype)
    ):
        return None
    return base, write[1], (seen, *write[2])


def _basic(base: torch.Tensor, index: ops.Index) -> torch.Tensor:
    return base[ops.basic_index(index)]


def write_chain(node: Any, array: fx.Node) -> list[tuple[fx.Node, Any, Path]]:
    """Return the writes that lead from ``array`` to ``node``, in order."""
    found: list[tuple[fx.Node, Any, Path]] = []
    while node is not array:
        write = written_part(node) or _written_as_seen(node) if isinstance(node, fx.Node) else None
        if write is None:
            raise NotAnArrayLoop(f"the carried value is not written in part: {node} makes all of it anew")
        found.append((node, write[1], write[2]))
        node = write[0]
    if not found:
        raise NotAnArrayLoop("the carried value never changes")
    return found[::-1]


def positions_of(
    source: fx.Node, path: Path, literals: dict[fx.Node, tuple[Any, ...]], trip_count: int
) -> torch.Tensor:
    """Follow ``path`` with the indices of ``source``'s elements in place of its values, at each step."""
    spec = spec_of(source)
    if not isinstance(spec, TensorSpec):
        raise NotAnArrayLoop(f"{source} is not one tensor")
    indices = torch.arange(numel(spec.shape)).reshape(spec.shape)
    known = affine_positions(indices, [call for move in path for call in _as_calls(move)], literals, trip_count)
    if known is not None:
        return known
    rows = []
    for step in range(trip_count):

        def at(node: fx.Node, step: int = step) -> Any:
            if node not in literals:
                raise NotAnArrayLoop(f"the place of a selection from {source} depends on {node}")
            return literals[node][step]

        part: Any = indices
        for move in path:
            if isinstance(move, Region):
                part = move.operation(part, *map_arg(move.arguments, at))
            else:
                rest, kwargs = map_arg(move.args[1:], at), map_arg(move.kwargs, at)
                assert callable(move.target)
                if move.target in _RESHAPES:
                    here = spec_of(move)
                    assert isinstance(here, TensorSpec)
                    part = part.reshape(here.shape)
                else:
                    part = move.target(part, *rest, **kwargs)
        rows.append(part)
    if any(row.shape != rows[0].shape for row in rows):
        raise NotAnArrayLoop(f"selections from {source} have another shape at each step")
    return torch.stack(rows)


def _as_calls(move: fx.Node | Region) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Return a step of a path as ``(function, arguments after the tensor, keyword arguments)``, or several."""
    if isinstance(move, fx.Node):
        return [(move.target, move.args[1:], dict(move.kwargs))]
    if move.operation is not _basic:
        return [(move.operation, move.arguments, {})]
    # X[:, i, j]: one selection or slice a dimension, the last first, so that the others keep their numbers.
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
    for dim, entry in reversed(list(enumerate(move.arguments[0]))):
        if isinstance(entry, tuple):
            calls.append((aten.slice.Tensor, (dim, *entry), {}))
        elif entry is not None:
            calls.append((aten.select.int, (dim, entry), {}))
    return calls


def selection(
    node: fx.Node, per_step: set[fx.Node], literals: dict[fx.Node, tuple[Any, ...]]
) -> tuple[fx.Node, Path] | None:
    """Return ``(source, path)`` if ``node`` selects, by literals alone, from a tensor that is not per step."""
    path: list[fx.Node] = []
    while node in per_step or node.target is operator.getitem or not isinstance(spec_of(node), TensorSpec):
        if node.op != "call_function" or node.target not in VIEWS or not isinstance(node.args[0], fx.Node):
            return None
        rest = [used for used in node.all_input_nodes if used is not node.args[0]]
        if any(used not in literals for used in rest):
            return None
        path.append(node)
        node = node.args[0]
        if node not in per_step and isinstance(spec_of(node), TensorSpec):
            break
    return (node, tuple(path[::-1])) if path else None
