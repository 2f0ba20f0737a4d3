"""places_to_writes: what is written through a constant mask or a constant index is written in place instead.

Fires where the places are known when the program is recorded, and are a box of the array: one position or an evenly
spaced range of each dimension::

    before                                                  after
    x_1 = where(arange(D) == 3, v, x_0)                     x_1 = write(x_0, v[:, 3], (None, 3))
    x_1 = scatter(x_0, 1, full((B, 1), 3), v)               x_1 = write(x_0, v[:, 0], (None, 3))
    x_1 = index_copy(x_0, 1, tensor([3]), v)                x_1 = write(x_0, v[:, 0], (None, 3))
    x_1 = index_put(x_0, [arange(B), full((B,), 3)], v)     x_1 = write(x_0, v, (None, 3))
    x_1 = cat([x_0[:, :3], v, x_0[:, 4:]], 1)               x_1 = write(x_0, v[:, 0], (None, 3))

Both sides move the same elements, so the bits are the same; but the right side is a loop that fills an array
(:mod:`fxjacobi.passes.collapse_sampling`). Where places come from a tensor that the model holds (a buffer, a module's
global), a guard compares its values at every call. Must not fire where a place comes from data, a parameter or a buffer
that the run may change, where dtypes or layouts differ, or where an index accumulates.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxjacobi import ops
from fxjacobi.assemble import assemble
from fxjacobi.emit import call
from fxjacobi.graph import TensorSpec, is_random, site_of, spec_of, spec_of_value, stamp
from fxjacobi.known_places import KnownPlaces
from fxjacobi.passes.base import Pass, PassResult

__all__ = ["PlacesToWrites", "places_to_writes"]

aten = torch.ops.aten

_LARGEST = 1 << 20
"""Elements of an array that are numbered."""

_OFTEN = 3
"""Writes to places that the model holds, for these to be guarded."""

_WRITES = frozenset(
    {
        aten.where.self,
        aten.scatter.src,
        aten.index_copy.default,
        aten.index_put.default,
        aten._unsafe_index_put.default,
        aten.cat.default,
    }
)


@dataclass(frozen=True)
class _Write:
    """``base`` with ``value``, of the shape of the box, at ``box``: a start, a length and a step a dimension.

    ``picked`` says which dimensions of ``value`` the box's places are to be taken from (a masked value is as large as the
    base); the others are as long as the box.
    """

    base: fx.Node
    value: fx.Node
    box: tuple[range, ...]
    picked: bool


def _tensor(node: object) -> TensorSpec | None:
    spec = spec_of(node) if isinstance(node, fx.Node) and node.op != "output" else None
    return spec if isinstance(spec, TensorSpec) else None


def _box(mask: torch.Tensor) -> tuple[range, ...] | None:
    """Return the places of ``mask`` as a range a dimension, if they are all of a product of ranges."""
    if mask.numel() == 0:
        return None
    ranges = []
    for dim in range(mask.dim()):
        line = mask.movedim(dim, 0).reshape(mask.shape[dim], -1).any(1).nonzero()[:, 0].tolist()
        if not line:
            return None
        step = line[1] - line[0] if len(line) > 1 else 1
        places = range(line[0], line[-1] + 1, step)
        if list(places) != line:
            return None
        ranges.append(places)
    count = 1
    for places in ranges:
        count *= len(places)
    return tuple(ranges) if count == int(mask.sum()) else None


def _is_all(box: tuple[range, ...], shape: tuple[int, ...]) -> bool:
    return all(len(places) == size for places, size in zip(box, shape, strict=True))


def _like(node: object, spec: TensorSpec) -> bool:
    own = _tensor(node)
    return own is not None and (own.shape, own.dtype, own.device, own.stride) == (
        spec.shape, spec.dtype, spec.device, spec.stride,
    )  # fmt: skip


def _masked(node: fx.Node, spec: TensorSpec, constants: KnownPlaces) -> _Write | None:
    mask = constants.value(node.args[0])
    if mask is None:
        return None
    for chosen, value, base in ((mask, node.args[1], node.args[2]), (~mask, node.args[2], node.args[1])):
        box = _box(chosen.expand(spec.shape))
        own = _tensor(value)
        if box is None or _is_all(box, spec.shape) or own is None or own.dtype != spec.dtype or not _like(base, spec):
            continue
        return _Write(base, value, box, picked=True)  # type: ignore[arg-type]
    return None


def _indexed(node: fx.Node, spec: TensorSpec, constants: KnownPlaces) -> _Write | None:
    """Read a scatter, an index_copy or an index_put by what it does to the numbers of the base's elements."""
    base = node.args[0]
    if node.target in (aten.index_put.default, aten._unsafe_index_put.default):
        indices: list[Any] = list(node.args[1])  # type: ignore[arg-type]
        value = node.args[2]
        places = [None if one is None else constants.value(one) for one in indices]
        known = all((one is None) == (place is None) for one, place in zip(indices, places, strict=True))
        if not known or (len(node.args) > 3 and node.args[3]):
            return None
        numbers = torch.arange(torch.Size(spec.shape).numel()).reshape(spec.shape)
        written = numbers[tuple(slice(None) if place is None else place for place in places)]
    else:
        dim, index, value = int(node.args[1]), constants.value(node.args[2]), node.args[3]  # type: ignore[arg-type]
        if index is None:
            return None
        numbers = torch.arange(torch.Size(spec.shape).numel()).reshape(spec.shape)
        if node.target is aten.index_copy.default:
            written = numbers.index_select(dim, index.reshape(-1))
        else:
            parts = tuple(slice(0, size) for size in index.shape)
            inside = [slice(None) if d == dim % len(spec.shape) else part for d, part in enumerate(parts)]
            written = numbers[tuple(inside)].gather(dim, index)
    own = _tensor(value)
    if own is None or own.dtype != spec.dtype or not _like(base, spec):
        return None
    mask = torch.zeros(spec.shape, dtype=torch.bool)
    mask.view(-1)[written.reshape(-1)] = True
    box = _box(mask)
    if box is None or written.numel() != int(mask.sum()) or _is_all(box, spec.shape):
        return None
    # The box's elements in order, apart from dimensions of one element, which the index may have dropped or added.
    if not torch.equal(written.reshape(-1), numbers[mask]):
        return None
    if torch.Size(own.shape).numel() != written.numel() or _sizes(own.shape) != _sizes(tuple(len(r) for r in box)):
        return None
    return _Write(base, value, box, picked=False)  # type: ignore[arg-type]


def _joined(node: fx.Node, spec: TensorSpec) -> _Write | None:
    """Read ``cat([x[:, :3], v, x[:, 4:]], 1)``: all that is joined but one part is where it was in one base."""
    dim = int(given) % len(spec.shape) if isinstance(given := node.args[1] if len(node.args) > 1 else 0, int) else 0
    at, parts, stays = 0, list[tuple[fx.Node, range, fx.Node | None]](), Counter[fx.Node]()
    for part in node.args[0]:  # type: ignore[union-attr]
        own = _tensor(part)
        if own is None or not isinstance(part, fx.Node) or len(own.shape) != len(spec.shape):
            return None
        places, at = range(at, at + own.shape[dim]), at + own.shape[dim]
        found = _stays(part, dim, places)
        if places:
            parts.append((part, places, found))
        if found is not None:
            stays[found] += len(places)
    # What is put in may be where it was too: net(x)[:, t : t + 1]. The larger one is the base.
    for base, _ in stays.most_common():
        others = [(part, places) for part, places, found in parts if found is not base]
        if len(others) == 1:
            break
    else:
        return None
    ((value, places),) = others
    own = _tensor(value)
    if own is None or own.dtype != spec.dtype or not _like(base, spec):
        return None
    box = tuple(places if d == dim else range(size) for d, size in enumerate(spec.shape))
    return _Write(base, value, box, picked=False)


def _stays(part: fx.Node, dim: int, places: range) -> fx.Node | None:
    """Return what ``part`` is the part of that lies at ``places`` along ``dim``, if it is one."""
    if part.target is aten.unsqueeze.default and len(places) == 1:
        row: Any = part.args[0]
        taken = isinstance(row, fx.Node) and row.target is aten.select.int and part.args[1] == dim
        return row.args[0] if taken and row.args[1:] == (dim, places.start) else None
    if part.target is not aten.slice.Tensor or (len(part.args) > 4 and part.args[4] != 1):
        return None
    arguments: tuple[Any, ...] = (*part.args, *(0, None, None)[len(part.args) - 1 :])
    base, along, start, stop = arguments[:4]
    source = _tensor(base)
    if source is None or along != dim or not all(bound is None or isinstance(bound, int) for bound in (start, stop)):
        return None
    inside = range(source.shape[dim])[start:stop]
    return base if inside == places else None


def _sizes(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _emit(graph: fx.Graph, write: _Write, values: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    spec, site = spec_of(node), site_of(node)
    assert isinstance(spec, TensorSpec)
    value = values[write.value]
    index: list[Any] = []
    if write.picked:
        if _tensor(write.value).shape != spec.shape:  # type: ignore[union-attr]
            value = call(graph, aten.expand.default, value, list(spec.shape), site=site)
        gone = 0
        for dim, (places, size) in enumerate(zip(write.box, spec.shape, strict=True)):
            if len(places) == 1:
                value = call(graph, aten.select.int, value, dim - gone, places[0], site=site)
                gone += 1
            elif len(places) < size:
                bounds = (places.start, places.stop, places.step)
                value = call(graph, aten.slice.Tensor, value, dim - gone, *bounds, site=site)
    else:
        wanted = [len(places) for places in write.box if len(places) > 1]
        single = [d for d, size in enumerate(_tensor(write.value).shape) if size == 1]  # type: ignore[union-attr]
        for dim in reversed(single):
            value = call(graph, aten.select.int, value, dim, 0, site=site)
        assert list(spec_of(value).shape) == wanted  # type: ignore[union-attr]
    for places, size in zip(write.box, spec.shape, strict=True):
        whole = len(places) == size and size != 1
        index.append(None if whole else places[0] if len(places) == 1 else (places.start, places.stop, places.step))
    while index and index[-1] is None:
        index.pop()
    return stamp(graph.call_function(ops.write, (values[write.base], value, tuple(index))), spec, site)


def places_to_writes(module: fx.GraphModule) -> fx.GraphModule:
    """Return ``module`` with writes through constant masks and indices as writes, or ``module`` if it has none."""
    constants = KnownPlaces(module)
    found: dict[fx.Node, _Write] = {}
    held: dict[fx.Node, list[fx.Node]] = {}
    for node in module.graph.nodes:
        spec = _tensor(node) if node.op == "call_function" and node.target in _WRITES else None
        if spec is None or not spec.shape or torch.Size(spec.shape).numel() > _LARGEST:
            continue
        if node.target is aten.cat.default:
            write = _joined(node, spec)
        else:
            read = _masked if node.target is aten.where.self else _indexed
            write = read(node, spec, constants)
        if write is not None:
            found[node] = write
            joins = node.target is aten.cat.default
            places = [one for one in node.all_input_nodes if not joins and one not in (write.base, write.value)]
            held[node] = [
                one for place in places if constants.value(place) is not None for one in constants.rests_on(place)
            ]
    if sum(map(bool, held.values())) < _OFTEN:  # no loop: a guard would cost more than a write is worth
        found = {node: write for node, write in found.items() if not held[node]}
    guarded = {one for node in found for one in held[node]}
    if not found:
        return module
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    expected: dict[str, Any] = {}
    last = next((n for n in reversed(module.graph.nodes) if n in guarded), None)
    for node in module.graph.nodes:
        write = found.get(node)
        values[node] = graph.node_copy(node, values.__getitem__) if write is None else _emit(graph, write, values, node)
        if node is last:
            expected = _guard(graph, module, {values[n]: constants.held[n] for n in module.graph.nodes if n in guarded})
    for node in reversed(list(graph.nodes)):
        old_constant = node.op in ("call_function", "get_attr") and not node.users
        if old_constant and node.target not in ops.GUARDS and not is_random(node):
            graph.erase_node(node)
    return assemble(graph, module, expected)


def _guard(graph: fx.Graph, module: fx.GraphModule, held: dict[fx.Node, torch.Tensor]) -> dict[str, Any]:
    """Append guards of the model's tensors, and return what they are compared with, by name."""
    expected: dict[str, Any] = {}
    names = (name for number in itertools.count() if not hasattr(module, name := f"places_{number}"))
    for (node, value), name in zip(held.items(), names, strict=False):
        expected[name] = value
        literal = stamp(graph.get_attr(name), spec_of_value(value), site_of(node))
        literal.meta["literal"] = True
        stamp(graph.call_function(ops.guard_tensor, (node, literal)), None, site_of(node))
    return expected


@dataclass(frozen=True)
class PlacesToWrites(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "places_to_writes"

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Rewrite the graph's own writes (not those in recorded submodules)."""
        return PassResult.of(places_to_writes(module), module)
