"""prefixes_to_writes: an array that is put together anew at each step, from a growing list, is written in place instead.

Fires on chains of concatenations along one dimension, each of a prefix and a constant filler, where each prefix is the
one before and one item more (a column of ``torch.stack(columns, 1)``, or a tensor of size 1 along the dimension)::

    before                                              after
    x_1 = cat([stack([v_0], 1), full((B, D - 1), c)])   x_1 = write(x_0, v_0, (None, 0))
    x_2 = cat([stack([v_0, v_1], 1), full(...)])        x_2 = write(x_1, v_1, (None, 1))
    x_3 = stack([v_0, v_1, v_2, full((B,), c), ...])    x_3 = write(x_2, v_2, (None, 2))
    x_4 = pad(stack([v_0, ..., v_3], 1), (0, D - 4))    x_4 = write(x_3, v_3, (None, 3))
    x_5 = full(..); x_5[:, :5] = stack([v_0, ..], 1)    x_5 = write(x_4, v_4, (None, 4))
    y = stack([v_0, ..., v_{D-1}], 1)                   y = write(x_{D-1}, v_{D-1}, (None, D - 1))

where ``x_0 = full((B, D), c)``. Both sides move the same elements, so the bits are the same; but the right side is a loop
that fills an array (:mod:`fxjacobi.passes.collapse_sampling`). Must not fire where dtypes differ, where a filler is no
constant, or on a chain of one. Chains that no step reads stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import fx

from fxjacobi import ops
from fxjacobi.assemble import assemble
from fxjacobi.emit import dense_stride
from fxjacobi.graph import TensorSpec, site_of, spec_of, stamp
from fxjacobi.passes.base import Pass, PassResult

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PrefixesToWrites", "prefixes_to_writes"]

aten = torch.ops.aten

_JOINS = (aten.stack.default, aten.cat.default, aten.constant_pad_nd.default)
_CONSTANTS = (aten.full.default, aten.zeros.default, aten.ones.default)


_Items: TypeAlias = "dict[tuple[fx.Node, int], tuple[tuple[fx.Node, bool], ...]]"


@dataclass(frozen=True, slots=True)
class _Prefix:
    """``node`` is the items along ``dim`` and, after them, ``value`` as far as the shape goes.

    An item is a node and whether it has the dimension (of size 1) or not.
    """

    node: fx.Node
    dim: int
    items: tuple[tuple[fx.Node, bool], ...]
    value: Any


def _tensor(node: object) -> TensorSpec | None:
    spec = spec_of(node) if isinstance(node, fx.Node) and node.op != "output" else None
    return spec if isinstance(spec, TensorSpec) else None


def _filler(node: fx.Node) -> Any:
    """Return the constant that fills ``node``'s value, or ``None``."""
    if node.target is aten.full.default:
        value = node.args[1]
        return value if isinstance(value, (bool, int, float)) else None
    return {aten.zeros.default: 0, aten.ones.default: 1}.get(node.target)  # type: ignore[call-overload]


def _dim(node: fx.Node, spec: TensorSpec) -> int:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(given, int)
    return given % len(spec.shape)


def _items(node: fx.Node, dim: int, known: _Items) -> tuple[tuple[fx.Node, bool], ...] | None:
    """Return the single places along ``dim`` that ``node`` consists of; ``known`` has those of concatenations before."""
    spec = _tensor(node)
    if spec is None:
        return None
    if (node, dim) in known:
        return known[node, dim]
    if node.target is aten.stack.default and _dim(node, spec) == dim:
        return tuple((item, False) for item in node.args[0])  # type: ignore[union-attr, misc]
    if spec.shape[dim] == 0:
        return ()
    return ((node, True),) if spec.shape[dim] == 1 else None


def _without_filler(parts: Sequence[fx.Node]) -> tuple[Sequence[fx.Node], Any]:
    """Return the leading parts that are no constant fill, and the value that the others, at the end, are filled with."""
    count, value = len(parts), None
    while count:
        filler = _filler(parts[count - 1])
        if filler is None or (value is not None and repr(filler) != repr(value)):
            break
        count, value = count - 1, filler
    return parts[:count], value


def _prefix(node: fx.Node, known: _Items) -> _Prefix | None:
    """Read ``node`` as a prefix and a filler, or as a prefix that is complete (value ``None``)."""
    spec = _tensor(node)
    if spec is None or not spec.shape or spec.stride != dense_stride(spec.shape):
        return None
    if node.target is aten.constant_pad_nd.default:
        return _padded(node, spec, known)
    if node.target is ops.write:
        return _filled(node, spec, known)
    if node.target is aten.stack.default:
        dim = _dim(node, spec)
        columns, value = _without_filler(node.args[0])  # type: ignore[arg-type]
        return _Prefix(node, dim, tuple((item, False) for item in columns), value)
    if node.target is not aten.cat.default:
        return None
    dim = _dim(node, spec)
    parts: tuple[fx.Node, ...] = tuple(node.args[0])  # type: ignore[arg-type]
    if any(part_spec is None or part_spec.dtype != spec.dtype for part_spec in map(_tensor, parts)):
        return None
    leading, value = _without_filler(parts)
    items: list[tuple[fx.Node, bool]] = []
    for part in leading:
        found = _items(part, dim, known)
        if found is None:
            return None
        items += found
    if value is None:
        known[node, dim] = tuple(items)
    return _Prefix(node, dim, tuple(items), value)


def _filled(node: fx.Node, spec: TensorSpec, known: _Items) -> _Prefix | None:
    """Read ``blank[:, :n] = stack(items, 1)`` as a prefix and a filler."""
    blank, prefix, index = node.args
    assert isinstance(blank, fx.Node)
    value, dim = _filler(blank), len(index) - 1  # type: ignore[arg-type]
    own = _tensor(prefix)
    if value is None or dim < 0 or own is None or any(entry is not None for entry in index[:-1]):  # type: ignore[index, union-attr]
        return None
    if len(own.shape) != len(spec.shape) or index[-1] != (0, own.shape[dim], 1):  # type: ignore[index]
        return None
    assert isinstance(prefix, fx.Node)
    items = _items(prefix, dim, known)
    return None if items is None else _Prefix(node, dim, items, value)


def _padded(node: fx.Node, spec: TensorSpec, known: _Items) -> _Prefix | None:
    """Read ``pad(stack(items, dim), (0, n))`` as a prefix and a filler."""
    source, widths = node.args[0], list(node.args[1])  # type: ignore[arg-type]
    value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)
    grown = [place for place, width in enumerate(widths) if width]
    if len(grown) != 1 or grown[0] % 2 == 0 or widths[grown[0]] < 0 or not isinstance(value, (bool, int, float)):
        return None
    dim = len(spec.shape) - 1 - grown[0] // 2
    assert isinstance(source, fx.Node)
    items = _items(source, dim, known)
    return None if items is None else _Prefix(node, dim, items, value)


def _chains(module: fx.GraphModule) -> dict[fx.Node, tuple[_Prefix, _Prefix | None]]:
    """Return, for each node to rewrite, what it is and the prefix it continues (``None``: it starts from filler)."""
    known: dict[Any, _Prefix] = {}
    items: _Items = {}
    found: dict[fx.Node, tuple[_Prefix, _Prefix | None]] = {}
    continued: set[fx.Node] = set()
    for node in module.graph.nodes:
        prefix = _prefix(node, items)
        spec = _tensor(node)
        if prefix is None or spec is None:
            continue
        if any(_tensor(item) is None or _tensor(item).dtype != spec.dtype for item, _ in prefix.items):  # type: ignore[union-attr]
            continue
        shape = (spec.shape, spec.dtype, spec.device, prefix.dim)
        if prefix.value is None:
            # Complete: it continues the chain that lacks the last item only.
            before = known.get((shape, prefix.items[:-1])) if prefix.items else None
            if before is not None:
                found[node] = (prefix, before)
                continued.add(before.node)
            continue
        if not prefix.items:
            found[node] = (prefix, None)
        else:
            before = known.get((shape, prefix.items[:-1]))
            if before is not None and repr(before.value) == repr(prefix.value):
                found[node] = (prefix, before)
                continued.add(before.node)
            elif len(prefix.items) == 1:
                found[node] = (prefix, None)
        if node in found:
            known[(shape, prefix.items)] = prefix
    # A chain of one is no loop.
    return {node: pair for node, pair in found.items() if pair[1] is not None or node in continued}


def prefixes_to_writes(module: fx.GraphModule) -> fx.GraphModule:
    """Return ``module`` with growing concatenations as writes, or ``module`` itself if it has none."""
    chains = _chains(module)
    if not any(before is not None for _, before in chains.values()):
        return module
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node not in chains:
            values[node] = graph.node_copy(node, values.__getitem__)
            continue
        prefix, before = chains[node]
        spec, site = spec_of(node), site_of(node)
        assert isinstance(spec, TensorSpec)
        if before is None:
            options: dict[str, Any] = {"dtype": spec.dtype, "device": spec.device}
            blank = graph.call_function(aten.full.default, (list(spec.shape), prefix.value), options)
            current = stamp(blank, spec, site)
        else:
            current = values[before.node]
        if prefix.items:
            item, sized = prefix.items[-1]
            place = len(prefix.items) - 1
            entry = (place, place + 1, 1) if sized else place
            index = (*(None,) * prefix.dim, entry)
            current = stamp(graph.call_function(ops.write, (current, values[item], index)), spec, site)
        values[node] = current
    for node in reversed(list(graph.nodes)):
        if not node.users and node.target in (*_JOINS, *_CONSTANTS, ops.write):
            graph.erase_node(node)
    return assemble(graph, module)


@dataclass(frozen=True)
class PrefixesToWrites(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "prefixes_to_writes"

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Rewrite the graph's own chains (not those in recorded submodules)."""
        return PassResult.of(prefixes_to_writes(module), module)
