"""A loop that fills an array: which elements each step writes, which it reads, and what its body computes when.

    for t in range(T):  X[p_t] = v_t(G(X), noise_t)

:func:`array_loop` takes the body apart into the array's versions (before and after each write of a step), the
*network* (what reads the array and is the same at every step), the *tail* (what belongs to one step) and the
*accesses* (the elements that step t selects for its tail, or writes). It proves nothing: see
:mod:`fxjacobi.causality`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxjacobi import ops
from fxjacobi.array_paths import NotAnArrayLoop, Steps, numel, positions_of, selection, write_chain, written_part
from fxjacobi.assemble import assemble
from fxjacobi.equations import is_effect, resting_on
from fxjacobi.graph import TensorSpec, operation_of, site_of, spec_of, stamp
from fxjacobi.inline_calls import inline_calls
from fxjacobi.loops import Carried, Literal, Loop, Scanned, Table

if TYPE_CHECKING:
    from collections.abc import Container, Iterator

    from fxjacobi.array_paths import Path

__all__ = ["Access", "ArrayLoop", "NotAnArrayLoop", "Write", "array_loop", "operation_key"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class Access:
    """Elements of a tensor that each step selects.

    Args:
        node: The node whose value the selection is.
        source: The node selected from.
        positions: ``(T, *shape)`` indices into the flattened source.
    """

    node: fx.Node
    source: fx.Node
    positions: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Write:
    """A write of a step: ``X.view(-1)[positions[t]] = value``.

    Args:
        node: The write's node, the array's next version.
        value: What is written.
        positions: ``(T, *shape)`` indices into the flattened array.
    """

    node: fx.Node
    value: fx.Node
    positions: torch.Tensor


@dataclass(frozen=True, eq=False)
class ArrayLoop:
    """A loop taken apart.

    Args:
        loop: The loop, its submodules inlined.
        array: The placeholder through which the body reads the array.
        carry: Its binding.
        writes: The writes of a step, in order (``K`` of them).
        accesses: What the tail selects, by node.
        per_step: Nodes whose value belongs to one step.
        touched: Nodes that depend on the array (and are no version of it).
        tail: The tail, in order: per-step nodes that are neither literals, selections nor writes.
        ends: Nodes whose values leave the steps: written values, then other outputs, then guards' arguments.
        states: What the tail carries from step to step beside the array, by placeholder (a last token, flags of samples
            that are done).
    """

    loop: Loop
    array: fx.Node
    carry: Carried
    writes: tuple[Write, ...]
    accesses: dict[fx.Node, Access]
    per_step: frozenset[fx.Node]
    touched: frozenset[fx.Node]
    tail: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]
    states: dict[fx.Node, Carried]

    @property
    def trip_count(self) -> int:
        """Number of steps, ``T``."""
        return self.loop.trip_count

    @property
    def equations(self) -> int:
        """Number of equations, ``T * K``."""
        return self.loop.trip_count * len(self.writes)

    @cached_property
    def versions(self) -> dict[fx.Node, int]:
        """The array's versions: 0 before the step's first write, ``k`` after its ``k``-th."""
        return {self.array: 0} | {write.node: k + 1 for k, write in enumerate(self.writes)}

    @cached_property
    def bindings(self) -> dict[fx.Node, Any]:
        """The binding of each placeholder."""
        placeholders = (node for node in self.loop.body.graph.nodes if node.op == "placeholder")
        return dict(zip(placeholders, self.loop.bindings, strict=True))

    @property
    def array_spec(self) -> TensorSpec:
        """Shape and type of the array."""
        spec = spec_of(self.array)
        assert isinstance(spec, TensorSpec)
        return spec

    @cached_property
    def outputs(self) -> tuple[Any, ...]:
        """The body's outputs."""
        outputs = self.loop.body.graph.output_node().args[0]
        assert isinstance(outputs, tuple)
        return outputs

    @cached_property
    def guards(self) -> tuple[fx.Node, ...]:
        """The body's guards."""
        return tuple(node for node in self.loop.body.graph.nodes if node.target in ops.GUARDS)

    def ranks(self) -> torch.Tensor:
        """Return ``int32`` of the array's shape: the equation ``t * K + k`` that writes an element, or ``-1``.

        Raises:
            NotAnArrayLoop: An element is written more than once.
        """
        spec = self.array_spec
        count = len(self.writes)
        rank = torch.full((numel(spec.shape),), -1, dtype=torch.int32)
        for k, write in enumerate(self.writes):
            flat = write.positions.reshape(self.trip_count, -1)
            equations = torch.arange(self.trip_count, dtype=torch.int32).mul(count).add(k)
            written = torch.zeros_like(rank)
            written.index_add_(0, flat.reshape(-1), torch.ones(flat.numel(), dtype=torch.int32))
            if bool((written > 1).any()) or bool((rank[flat] >= 0).any()):
                raise NotAnArrayLoop(f"{write.node} writes an element of the array more than once")
            rank[flat] = equations[:, None].expand_as(flat)
        return rank.reshape(spec.shape)

    def stepped(self, end: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Return where the network of ``end`` becomes another one at each step, and what it reads there.

        That is the first operation of the tail that reads what is computed of the whole array, and a value of the step.
        ``None``: the tail reads selections of the network's results only.
        """
        if not any(
            used in self.versions or used in self.touched for used in self.uses(end) if used not in self.accesses
        ):
            return None
        rests = resting_on([end])
        for node in self.tail:
            if node not in rests:
                continue
            inputs = [used for used in node.all_input_nodes if used not in self.accesses]
            own = [used for used in inputs if used in self.per_step and used not in self.touched]
            if own and any(used in self.versions or used in self.touched for used in inputs):
                return node, own[0]
        return None

    def uses(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """Return what ``node`` of the tail rests on: accesses, whole tensors that are not per step, array versions."""
        found: dict[fx.Node, None] = {}
        pending = [node]
        seen: set[fx.Node] = set()
        inside = set(self.tail)
        while pending:
            one = pending.pop()
            if one in seen:
                continue
            seen.add(one)
            if one in inside:
                pending.extend(one.all_input_nodes)
            else:
                found[one] = None
        return tuple(found)


def array_loop(loop: Loop) -> ArrayLoop:
    """Take ``loop`` apart.

    Raises:
        NotAnArrayLoop: It does not carry one array that it fills, draws random numbers, or writes in a way that is not
            a selection fixed before the loop starts.
    """
    loop = _tidied(loop)
    body = loop.body
    nodes = list(body.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    bindings = dict(zip(placeholders, loop.bindings, strict=True))
    outputs = body.graph.output_node().args[0]
    assert isinstance(outputs, tuple)
    steps = Steps.of(loop)
    array, found, states = _carried(body, bindings, outputs, steps)
    carry = bindings[array]
    versions = [array, *(node for node, _, _ in found)]

    per_step: set[fx.Node] = {node for node in placeholders if isinstance(bindings[node], (Literal, Scanned, Table))}
    per_step |= set(states)
    touched: set[fx.Node] = set()
    for node in nodes:
        if node.op in ("placeholder", "output") or node in versions:
            continue
        if any(used in per_step for used in node.all_input_nodes):
            per_step.add(node)
        if any(used in touched or used in versions for used in node.all_input_nodes):
            touched.add(node)
        if _draws(node):
            raise NotAnArrayLoop(f"{operation_of(node)} at {site_of(node)} draws random numbers inside the loop", node)
    writes = []
    for node, value, path in found:
        if not isinstance(value, fx.Node):
            raise NotAnArrayLoop(f"{node} writes a Python value")
        writes.append(Write(node, value, positions_of(array, path, steps)))

    needed, guards = _needed(nodes, versions, outputs, [write.value for write in writes])
    paths = {}
    for node in nodes:
        if node in needed and node in per_step:
            source_path = selection(node, per_step, steps, versions)
            if source_path is not None:
                paths[node] = source_path
    tail_users = _tail_users(needed, per_step, paths, outputs, writes, guards)
    tail = tuple(node for node in nodes if node in tail_users and node not in paths and node.op != "placeholder")
    kept = {
        node: Access(node, source, positions_of(source, path, steps))
        for node, (source, path) in paths.items()
        if node in tail_users
    }
    rest = [o for o in outputs if isinstance(o, fx.Node) and o not in versions]
    ends = [*(write.value for write in writes), *rest, *(g.args[0] for g in guards if isinstance(g.args[0], fx.Node))]
    return ArrayLoop(
        loop=loop,
        array=array,
        carry=carry,
        writes=tuple(writes),
        accesses=kept,
        per_step=frozenset(per_step),
        touched=frozenset(touched),
        tail=tail,
        ends=tuple(dict.fromkeys(ends)),
        states=states,
    )


def _carried(
    body: fx.GraphModule, bindings: dict[fx.Node, Any], outputs: tuple[Any, ...], steps: Steps
) -> tuple[fx.Node, list[tuple[fx.Node, Any, Path]], dict[fx.Node, Carried]]:
    """Return the array that the loop fills, its writes, and what it carries beside it."""
    carries = {node: b for node, b in bindings.items() if isinstance(b, Carried)}
    chains: dict[fx.Node, list[tuple[fx.Node, Any, Path]]] = {}
    reason: NotAnArrayLoop | None = None
    for node, binding in carries.items():
        try:
            chains[node] = write_chain(outputs[binding.output], node, steps)
        except NotAnArrayLoop as no_chain:
            reason = reason or no_chain
    if len(chains) != 1:
        if len(carries) == 1 and reason is not None:
            raise reason
        producers = [_producer(body, binding.output) for binding in carries.values()]
        others = [node for node in producers if node is not None and written_part(node, steps) is None]
        what = "".join(f"; {operation_of(node)} at {site_of(node)} makes one" for node in others[:1])
        raise NotAnArrayLoop(
            f"the body carries {len(carries)} values, of which it fills {len(chains)} position by position{what}",
            others[0] if others else None,
        )
    array, found = next(iter(chains.items()))
    versions = {array, *(node for node, _, _ in found)}
    states = {node: binding for node, binding in carries.items() if node is not array}
    for node, binding in carries.items():
        if binding.distance != 1 or not isinstance(spec_of(node), TensorSpec):
            raise NotAnArrayLoop(f"the carried value {node} comes from {binding.distance} steps before", node)
        if node in states and outputs[binding.output] in versions:
            message = f"the body carries {len(carries)} values, of which {node} is the array as it was a step before"
            raise NotAnArrayLoop(message, node)
    return array, found, states


def _producer(body: fx.GraphModule, output: int) -> fx.Node | None:
    """Return the operation that makes an output of the body."""
    node = body.graph.output_node().args[0][output]  # type: ignore[index]
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op == "call_function" else None


def _tidied(loop: Loop) -> Loop:
    """Inline recorded submodules, drop what nobody reads (guards are read by the run), compute equal things once."""
    body = inline_calls(loop.body, only_single=False)
    alive: set[fx.Node] = set()
    for node in reversed(body.graph.nodes):
        if (
            node.op in ("placeholder", "output")
            or node.target in ops.GUARDS
            or any(user in alive for user in node.users)
        ):
            alive.add(node)
    known: dict[Any, fx.Node] = {}
    first: dict[fx.Node, fx.Node] = {}  # of the nodes that compute the same
    for node in body.graph.nodes:
        if node in alive:
            key = operation_key(node, first) if node.op == "call_function" and node.target not in ops.GUARDS else node
            first[node] = known.setdefault(key, node)
    if len(known) == len(body.graph.nodes):
        return Loop(body, loop.trip_count, loop.bindings, loop.results)  # an object of its own: see the caller's cache
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in body.graph.nodes:
        if node in alive:
            if first[node] is not node:
                values[node] = values[first[node]]
                continue
            values[node] = graph.node_copy(node, values.__getitem__)
            if node.op == "output":
                values[node].args = (map_arg(node.args[0], values.__getitem__),)
            else:
                stamp(values[node], spec_of(node), site_of(node))
    # inline_calls gives the names; assemble resolves them.
    return Loop(assemble(graph, body), loop.trip_count, loop.bindings, loop.results)


def operation_key(node: fx.Node, values: dict[fx.Node, fx.Node]) -> Any:
    """Return what makes two calls the same: operation and arguments, after replacing nodes by ``values``."""

    def key(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(key(item) for item in value)
        if isinstance(value, dict):
            return tuple((name, key(item)) for name, item in sorted(value.items()))
        if isinstance(value, slice):
            return ("slice", key((value.start, value.stop, value.step)))
        if isinstance(value, fx.Node):
            return values[value]
        # 1, 1.0 and True are different arguments; so are 0.0 and -0.0.
        return (type(value), repr(value) if isinstance(value, (float, complex)) else value)

    return (node.op, node.target, key(node.args), key(node.kwargs))


def _draws(node: fx.Node) -> bool:
    return node.target not in ops.GUARDS and node.op in ("call_function", "call_module") and is_effect(node)


def _needed(
    nodes: list[fx.Node], versions: list[fx.Node], outputs: tuple[Any, ...], values: list[fx.Node]
) -> tuple[set[fx.Node], list[fx.Node]]:
    """Return the nodes that written values, outputs and guards rest on, versions not passed through; and the guards."""
    guards = [node for node in nodes if node.target in ops.GUARDS]
    return resting_on([*values, *(o for o in outputs if isinstance(o, fx.Node)), *guards], stop=versions), guards


def _tail_users(
    needed: set[fx.Node],
    per_step: set[fx.Node],
    accesses: Container[fx.Node],
    outputs: tuple[Any, ...],
    writes: list[Write],
    guards: list[fx.Node],
) -> set[fx.Node]:
    """Return the per-step nodes reached from the ends without passing through a selection."""
    ends: Iterator[Any] = iter([*(write.value for write in writes), *outputs, *(arg for g in guards for arg in g.args)])
    pending = [node for node in ends if isinstance(node, fx.Node) and node in per_step and node in needed]
    reached: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in reached:
            continue
        reached.add(node)
        if node not in accesses:
            pending.extend(used for used in node.all_input_nodes if used in per_step and used in needed)
    return reached
