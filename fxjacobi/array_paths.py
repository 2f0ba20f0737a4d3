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
from fxjacobi.graph import TensorSpec, operation_of, site_of, spec_of
from fxjacobi.loops import Literal
from fxjacobi.rule_table import overloads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.loops import Loop

__all__ = [
    "NotAnArrayLoop",
    "Path",
    "Region",
    "Steps",
    "numel",
    "positions_of",
    "selection",
    "write_chain",
    "written_part",
]

aten = torch.ops.aten

_RESHAPES = frozenset(overloads("view.default", "_unsafe_view", "reshape", "view_copy.default", "_reshape_alias"))

_COPIES = frozenset([ops.restride, *overloads("clone", "alias")])

_LARGEST = 1 << 24
"""Places that are compared one by one, where two ways to a part are not the same operations."""

Path: TypeAlias = "tuple[fx.Node | Region, ...]"
_Call: TypeAlias = "tuple[Any, tuple[Any, ...], dict[str, Any]]"


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


@dataclass(frozen=True, slots=True)
class Steps:
    """What the literals of a loop's body are at each step.

    Args:
        literals: Their values, by placeholder.
        trip_count: Number of steps, ``T``.
    """

    literals: dict[fx.Node, tuple[Any, ...]]
    trip_count: int

    @classmethod
    def of(cls, loop: Loop) -> Steps:
        """Return those of ``loop``."""
        placeholders = loop.body.graph.find_nodes(op="placeholder")
        bound = zip(placeholders, loop.bindings, strict=True)
        return cls({node: b.values for node, b in bound if isinstance(b, Literal)}, loop.trip_count)


def written_part(node: fx.Node, steps: Steps) -> tuple[fx.Node, Any, Path] | None:
    """Return ``(base, value, path to the written part)`` if ``node`` is ``base`` with a part of it written.

    What is written may be a part of a part, put back into the part, and that into the base (``X[:, i][:, j] = v``), and
    the base may be seen otherwise meanwhile (``X.view(B, H, W)[:, i, j] = v``, ``X.T[t] = v``).
    """
    if node.op != "call_function":
        return None
    found = _written_into(node, steps)
    if found is None:
        return _written_as_seen(node, steps)
    base, value, path = found
    return _seen_from(base, []) or base, value, path


def _written_into(node: fx.Node, steps: Steps) -> tuple[fx.Node, Any, Path] | None:
    """Return ``(base, value, path)`` of an operation that writes, as deep as what it writes is a part written to."""
    found = _written(node)
    if found is None:
        return None
    base, value, region = found
    inner = written_part(value, steps) if isinstance(value, fx.Node) else None
    if inner is not None and _same_part(inner[0], base, region, steps):
        return base, inner[1], (region, *inner[2])
    return base, value, (region,)


def _written(node: fx.Node) -> tuple[fx.Node, Any, Region] | None:
    """Return ``(base, value, part)`` of one operation that writes."""
    if node.target is ops.write:
        base, value, index = node.args
        assert isinstance(base, fx.Node)
        return base, value, Region(_basic, (index,))
    scatters = {
        aten.select_scatter.default: (aten.select.int, 2),
        aten.slice_scatter.default: (aten.slice.Tensor, 2),
        aten.diagonal_scatter.default: (aten.diagonal.default, 2),
    }
    if node.target in scatters:
        operation, first = scatters[node.target]
        base, value = node.args[:2]
        assert isinstance(base, fx.Node)
        return base, value, Region(operation, tuple(node.args[first:]))
    if node.target is aten.index_put.default and not (len(node.args) > 3 and node.args[3]):
        base, index, value = node.args[:3]
        assert isinstance(base, fx.Node)
        return base, value, Region(aten.index.Tensor, (index,))
    return None


def _views(node: fx.Node, base: fx.Node) -> list[fx.Node] | None:
    """Return the views that lead from ``base`` to ``node``, in order."""
    found: list[fx.Node] = []
    while node is not base:
        if node.op != "call_function" or node.target not in VIEWS or not isinstance(node.args[0], fx.Node):
            return None
        found.append(node)
        node = node.args[0]
    return found[::-1]


def _same_part(part: fx.Node, base: fx.Node, region: Region, steps: Steps) -> bool:
    """Whether ``part`` is what ``region`` is of ``base``, at every step: of what both are views of."""
    root, views = base, _views(part, base)
    before: list[fx.Node] = []
    while views is None and root.op == "call_function" and root.target in VIEWS and isinstance(root.args[0], fx.Node):
        before.insert(0, root)
        root = root.args[0]
        views = _views(part, root)
    spec, own = spec_of(root), spec_of(part)
    if views is None or not isinstance(spec, TensorSpec) or not isinstance(own, TensorSpec):
        return False
    if not before and len(views) == 1 and (views[0].target, views[0].args[1:]) == (region.operation, region.arguments):
        return True
    ways: list[Path] = [tuple(views), (*before, region)]
    entries = [_entries(spec.shape, [call for move in way for call in _as_calls(move)]) for way in ways]
    if entries[0] is not None and entries[0] == entries[1]:
        return True
    if numel(own.shape) * steps.trip_count > _LARGEST:
        return False
    try:
        return torch.equal(*(positions_of(root, way, steps) for way in ways))
    except NotAnArrayLoop:
        return False


def _entries(shape: Sequence[int], calls: Sequence[_Call]) -> dict[int, Any] | None:
    """Return what selections and slices take of each dimension, or ``None`` where there is something else."""
    dims, entries = list(range(len(shape))), dict[int, Any]()
    for function, args, kwargs in calls:
        if kwargs or function not in (aten.select.int, aten.slice.Tensor):
            return None
        at = int(args[0] if args else 0) % len(dims)
        dim = dims[at]
        if dim in entries:
            return None
        if function is aten.select.int:
            del dims[at]
            entries[dim] = args[1] % shape[dim] if isinstance(args[1], int) else args[1]
            continue
        bounds = (*args[1:], *(None, None, 1)[len(args[1:]) :])
        if not any(isinstance(bound, fx.Node) for bound in bounds):
            bounds = slice(*bounds).indices(shape[dim])
        if bounds != (0, shape[dim], 1):
            entries[dim] = bounds
    return entries


def _written_as_seen(node: fx.Node, steps: Steps) -> tuple[fx.Node, Any, Path] | None:
    """Return the parts of a write to ``base`` seen otherwise (reshaped, transposed), if ``node`` is seen as ``base`` is."""
    outer: list[fx.Node] = []
    at = node
    while at.op == "call_function" and (at.target in VIEWS or at.target in _COPIES) and len(at.all_input_nodes) == 1:
        if at is not node and len(at.users) > 1:
            return None
        outer.append(at)
        at = at.all_input_nodes[0]
    write = _written_into(at, steps) if outer and len(at.users) == 1 else None
    if write is None:
        return None
    base = _seen_from(write[0], outer[::-1])
    if base is None:
        return None
    views = _views(write[0], base)
    assert views is not None
    return base, write[1], (*views, *write[2])


def _seen_from(node: fx.Node, outer: Sequence[fx.Node]) -> fx.Node | None:
    """Return what ``node`` is a view of, such that ``outer`` see it as it is again."""
    views: list[fx.Node] = []
    while node.op == "call_function" and node.target in VIEWS and len(node.all_input_nodes) == 1:
        views.append(node)
        node = node.all_input_nodes[0]
        if _is_identity(node, [*reversed(views), *outer]):
            return node
    return None


def _is_identity(base: fx.Node, moves: Sequence[fx.Node]) -> bool:
    """Whether ``moves`` leave each element of ``base`` where it is."""
    old, new = spec_of(base), spec_of(moves[-1])
    if not isinstance(old, TensorSpec) or not isinstance(new, TensorSpec):
        return False
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return False
    indices = torch.arange(numel(old.shape)).reshape(old.shape)
    part: Any = indices
    for move in moves:
        if move.target in _COPIES:
            continue
        for function, args, kwargs in _as_calls(move):
            part = function(part, *args, **kwargs)
    return isinstance(part, torch.Tensor) and torch.equal(part, indices)


def _basic(base: torch.Tensor, index: ops.Index) -> torch.Tensor:
    return base[ops.basic_index(index)]


def write_chain(node: Any, array: fx.Node, steps: Steps) -> list[tuple[fx.Node, Any, Path]]:
    """Return the writes that lead from ``array`` to ``node``, in order."""
    found: list[tuple[fx.Node, Any, Path]] = []
    while node is not array:
        write = written_part(node, steps) if isinstance(node, fx.Node) else None
        if write is None:
            made = operation_of(node) if isinstance(node, fx.Node) and node.op == "call_function" else str(node)
            site = site_of(node) if isinstance(node, fx.Node) else None
            where = f" at {site}" if site else ""
            raise NotAnArrayLoop(
                f"the carried value is not written in part: {made} ({node}){where} makes all of it anew"
            )
        found.append((node, write[1], write[2]))
        node = write[0]
    if not found:
        raise NotAnArrayLoop("the carried value never changes")
    return found[::-1]


def positions_of(source: fx.Node, path: Path, steps: Steps) -> torch.Tensor:
    """Follow ``path`` with the indices of ``source``'s elements in place of its values, at each step."""
    spec = spec_of(source)
    if not isinstance(spec, TensorSpec):
        raise NotAnArrayLoop(f"{source} is not one tensor")
    indices = torch.arange(numel(spec.shape)).reshape(spec.shape)
    literals = steps.literals
    known = affine_positions(indices, [call for move in path for call in _as_calls(move)], literals, steps.trip_count)
    if known is not None:
        return known
    rows = []
    for step in range(steps.trip_count):

        def at(node: fx.Node, step: int = step) -> Any:
            if node not in literals:
                raise NotAnArrayLoop(f"the place of a selection from {source} depends on {node}")
            return literals[node][step]

        part: Any = indices
        for move in path:
            if isinstance(move, Region):
                part = move.operation(part, *map_arg(move.arguments, at))
            else:
                for function, args, kwargs in _as_calls(move):
                    part = function(part, *map_arg(args, at), **map_arg(kwargs, at))
        rows.append(part)
    if any(row.shape != rows[0].shape for row in rows):
        raise NotAnArrayLoop(f"selections from {source} have another shape at each step")
    return torch.stack(rows)


def _as_calls(move: fx.Node | Region) -> list[_Call]:
    """Return a step of a path as ``(function, arguments after the tensor, keyword arguments)``, or several."""
    if isinstance(move, fx.Node) and move.target in _RESHAPES:
        spec = spec_of(move)  # its arguments may be a view's, which other strides do not allow
        assert isinstance(spec, TensorSpec)
        return [(aten.reshape.default, (list(spec.shape),), {})]
    if isinstance(move, fx.Node):
        return [(move.target, move.args[1:], dict(move.kwargs))]
    if move.operation is not _basic:
        return [(move.operation, move.arguments, {})]
    # X[:, i, j]: one selection or slice a dimension, the last first, so that the others keep their numbers.
    calls: list[_Call] = []
    for dim, entry in reversed(list(enumerate(move.arguments[0]))):
        if isinstance(entry, tuple):
            calls.append((aten.slice.Tensor, (dim, *entry), {}))
        elif entry is not None:
            calls.append((aten.select.int, (dim, entry), {}))
    return calls


def selection(
    node: fx.Node, per_step: set[fx.Node], steps: Steps, versions: Sequence[fx.Node]
) -> tuple[fx.Node, Path] | None:
    """Return ``(source, path)`` if ``node`` selects, by literals alone, from a tensor that is not per step.

    A part of the array that is seen otherwise is a part of the array, of which it is known when it is written.
    """
    path: list[fx.Node] = []
    while node in per_step or node.target is operator.getitem or not isinstance(spec_of(node), TensorSpec):
        if node.op != "call_function" or node.target not in VIEWS or not isinstance(node.args[0], fx.Node):
            return None
        rest = [used for used in node.all_input_nodes if used is not node.args[0]]
        if any(used not in steps.literals for used in rest):
            return None
        path.append(node)
        node = node.args[0]
        if node not in per_step and isinstance(spec_of(node), TensorSpec):
            break
    if not path:
        return None
    for version in versions:
        views = _views(node, version)
        if views is not None and all(len(view.all_input_nodes) == 1 for view in views):
            return version, (*views, *path[::-1])
    return node, tuple(path[::-1])
