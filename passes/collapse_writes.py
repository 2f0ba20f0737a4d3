"""collapse_writes: an array that a loop only writes to, place by place, is written once, after the values are known.

Fires on a loop whose body is nothing but writes (``fxjacobi.ops.write``, ``aten.select_scatter``,
``aten.slice_scatter``) at places known when the loop was recorded, into one array carried at distance 1, of which
only single steps (the last, as a rule) are results::

    before                                              after
    recurrence_1 = self.recurrence_1(x0, map_0[0])      write_steps(x0, map_0[0], (None, range(0, 784)))

Must not fire where the loop reads the array (autoregressive sampling), where its history is a result, where a place
depends on data, nor on additive accumulation, whose rounding depends on the order of the steps.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import fx, nn

from fxjacobi import ops
from fxjacobi.emit import call, rebuilt
from fxjacobi.equations import body_outputs
from fxjacobi.graph import TensorSpec, site_of, spec_of, stamp
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Step, Table
from fxjacobi.passes.base import Pass, PassResult
from fxjacobi.written import write_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.loops import Binding

__all__ = ["CollapseWrites"]

aten = torch.ops.aten

_Entry: TypeAlias = "int | tuple[int, int, int] | None"


@dataclass(frozen=True, slots=True)
class _Write:
    """One write of a step: which body value goes where, at each step."""

    value: fx.Node
    places: tuple[tuple[_Entry, ...], ...]


def _entry(entry: Any, size: int) -> _Entry:
    """Normalise one entry of an index; ``None`` where it takes the whole dimension."""
    if entry is None or isinstance(entry, int):
        return entry
    start, stop, step = slice(*entry).indices(size)
    return None if (start, stop, step) == (0, size, 1) else (start, stop, step)


def _write_of(node: fx.Node, base: fx.Node, bindings: dict[fx.Node, Binding], trip_count: int) -> _Write | None:
    """Return what ``node`` writes into ``base``, if it is a write to known places."""
    spec = spec_of(base)
    if not isinstance(spec, TensorSpec) or not node.args or node.args[0] is not base:
        return None
    args: tuple[Any, ...] = node.args
    index: Any
    if node.target is ops.write:
        value, index = args[1], args[2]
    elif node.target is aten.select_scatter.default:
        value = args[1]
        index = (*(None,) * (args[2] % len(spec.shape)), args[3])
    elif node.target is aten.slice_scatter.default:
        rest: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 2 :]]
        value = rest[0]
        index = (*(None,) * (rest[1] % len(spec.shape)), tuple(rest[2:]))
    else:
        return None
    if node.kwargs or not isinstance(value, fx.Node) or value is base:
        return None

    places = []
    for step in range(trip_count):

        def at_step(node: fx.Node, step: int = step) -> Any:
            binding = bindings.get(node)
            return binding.values[step] if isinstance(binding, Literal) else node

        entries: Any = fx.map_arg(index, at_step)
        if _has_nodes(entries):
            return None
        places.append(tuple(_entry(e, size) for e, size in zip(entries, spec.shape, strict=False)))
    return _Write(value, tuple(places))


def _has_nodes(arguments: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(arguments, found.append)
    return bool(found)


def _columns(write: _Write, steps: int, shape: Sequence[int]) -> tuple[Any, ...] | None:
    """Turn a place a step into places a dimension; ``None`` if a dimension is written in unlike ways."""
    columns: list[Any] = []
    for dim, column in enumerate(zip(*write.places[:steps], strict=True)):
        if all(entry is None for entry in column):
            columns.append(None)
        elif all(isinstance(entry, int) for entry in column):
            columns.append(_as_range(column))
        else:
            slices = tuple((0, shape[dim], 1) if entry is None else entry for entry in column)
            if any(isinstance(entry, int) for entry in slices):
                return None
            if len({len(range(*entry)) for entry in slices}) != 1:
                return None
            columns.append(slices)
    return tuple(columns)


def _as_range(values: tuple[int, ...]) -> Sequence[int]:
    if len(values) > 1 and min(values) >= 0:
        step = values[1] - values[0]
        if step > 0 and values == tuple(range(values[0], values[0] + step * len(values), step)):
            return range(values[0], values[-1] + 1, step)
    return values


def _writes(loop: Loop) -> tuple[int, list[_Write]] | None:
    """Return the operand that is written to and the writes of a step in order, if ``loop`` does nothing else."""
    body, outputs = loop.body, body_outputs(loop.body)
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    bindings = dict(zip(placeholders, loop.bindings, strict=True))
    carries = [(node, b) for node, b in bindings.items() if isinstance(b, Carried)]
    if len(carries) != 1 or carries[0][1].distance != 1:
        return None
    if not all(isinstance(r, Step) and outputs[r.output] is outputs[carries[0][1].output] for r in loop.results):
        return None
    last, binding = carries[0]
    writes = []
    for node in body.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        write = _write_of(node, last, bindings, loop.trip_count)
        if write is None or len(last.users) != 1:
            return None
        if not isinstance(bindings.get(write.value), (Scanned, Table, Invariant)):
            return None
        last = node
        writes.append(write)
    users = [user for user in last.users if user.op != "output"]
    if not writes or users or outputs[binding.output] is not last:
        return None
    return binding.init[0], writes


def _stacked(graph: fx.Graph, binding: Scanned | Table | Invariant, steps: int, operands: Sequence[fx.Node]) -> fx.Node:
    """Append the values of the first ``steps`` steps, ``(steps, ...)``."""
    match binding:
        case Scanned(operand, dim, indices):
            value, start = operands[operand], indices[0]
            if list(indices[:steps]) != list(range(start, start + steps)):
                slices = [call(graph, aten.select.int, value, dim, i) for i in indices[:steps]]
                return call(graph, aten.stack.default, slices)
            if (start, steps) != (0, _shape(value)[dim]):
                value = call(graph, aten.slice.Tensor, value, dim, start, start + steps)
            return value if dim == 0 else call(graph, aten.movedim.int, value, dim, 0)
        case Table(table):
            return call(graph, aten.stack.default, [operands[i] for i in table[:steps]])
        case Invariant(operand):
            return call(graph, aten.expand.default, operands[operand], [steps, *_shape(operands[operand])])


def _shape(node: fx.Node) -> tuple[int, ...]:
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    return spec.shape


def _part_shape(place: tuple[_Entry, ...], shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of what is written at ``place``."""
    sizes = []
    for dim, size in enumerate(shape):
        entry = place[dim] if dim < len(place) else None
        if not isinstance(entry, int):
            sizes.append(size if entry is None else len(range(*entry)))
    return tuple(sizes)


def _independent(writes: Sequence[_Write], steps: int, shape: Sequence[int]) -> bool:
    """Whether one write's steps may all go before the next write's: no place of one is a place of another."""
    if len(writes) == 1:
        return True
    owner = torch.full(tuple(shape), -1, dtype=torch.int32, device="cpu")
    for i, write in enumerate(writes):
        for place in write.places[:steps]:
            index = ops.basic_index(place)
            if bool(((owner[index] != -1) & (owner[index] != i)).any()):
                return False
            owner[index] = i
    return True


def _collapse(module: fx.GraphModule) -> tuple[fx.GraphModule, bool]:
    graph, env, new = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, nn.Module]()
    modified = False
    for node in module.graph.nodes:
        if node in env:
            continue
        found = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(found, fx.GraphModule):
            inner, changed = _collapse(found)
            if changed:
                new[str(node.target)], modified = inner, True
        elif isinstance(found, Loop):
            inner, changed = _collapse(found.body)
            if changed:
                found = new[str(node.target)] = Loop(inner, found.trip_count, found.bindings, found.results)
                modified = True
            values = _collapsed(graph, found, [env[n] for n in node.args])
            if values is not None and all(user.target is operator.getitem for user in node.users):
                env.update({user: values[user.args[1]] for user in node.users})
                modified = True
                continue
        env[node] = graph.node_copy(node, env.__getitem__)
    return rebuilt(module, graph, new), modified


def _collapsed(graph: fx.Graph, loop: Loop, operands: Sequence[fx.Node]) -> list[fx.Node] | None:
    """Append what takes the place of ``loop``, if it is one that this pass fires on."""
    found = _writes(loop)
    if found is None:
        return None
    base, writes = found
    spec = spec_of(operands[base])
    assert isinstance(spec, TensorSpec)
    placeholders = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
    all_steps = [result.step + 1 for result in loop.results if isinstance(result, Step)]
    columns = {steps: [_columns(write, steps, spec.shape) for write in writes] for steps in all_steps}
    for write in writes:
        if _part_shape(write.places[0], spec.shape) != _shape(write.value):
            return None
    if any(c is None for column in columns.values() for c in column):
        return None
    if not _independent(writes, max(all_steps), spec.shape):
        return None
    results = []
    for steps in all_steps:
        value = operands[base]
        for write, places in zip(writes, columns[steps], strict=True):
            binding = loop.bindings[placeholders.index(write.value)]
            assert isinstance(binding, (Scanned, Table, Invariant))
            values = _stacked(graph, binding, steps, operands)
            value = stamp(graph.call_function(write_steps, (value, values, places)), spec, site_of(write.value))
        results.append(value)
    return results


@dataclass(frozen=True)
class CollapseWrites(Pass):
    """Loops that only write into an array become one write each."""

    name: ClassVar[str] = "collapse_writes"

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Collapse every such loop, those in bodies included."""
        result, modified = _collapse(module)
        return PassResult(result, True) if modified else PassResult(module, False)
