"""Loop distribution: to which block each node of a loop's body goes, and in which order the blocks run.

Every recurrence of the body's dependence graph is a block of its own. The nodes outside recurrences form as few maps
as the order allows: a node's *stage* is the largest number of recurrences on a path that leads to it, and the nodes
of one stage are one map, ``map_0, recurrences of stage 0, map_1, ...`` (R. Allen and K. Kennedy, Automatic
translation of FORTRAN programs to vector form, 1987, section 5). What is needed at a few steps only, such as the head
applied to the last state, goes to a map of those steps.

Three kinds of node follow another one instead: ``operator.getitem`` its producer, a view of a recurrence's value that
recurrence, and a reduction of a value too large to be kept for all steps the recurrence that makes the value.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import networkx as nx

from fxjacobi.emit import elements, is_view, same_layout, size_in_bytes
from fxjacobi.equations import Equations, body_outputs, equations_of, is_effect
from fxjacobi.graph import Spec, TensorSpec, spec_of
from fxjacobi.loops import Carried, Literal, Loop, Step

if TYPE_CHECKING:
    from torch import fx

__all__ = ["FEW", "Block", "Delayed", "Distribution", "distribute"]

FEW = 8
"""A map needed at so many steps or fewer, of at least twice as many, is evaluated at those only."""

_LIGHT = 4
"""A view may be recomputed from a base this many times its size; from a larger one, its value is kept instead."""

Need: TypeAlias = "frozenset[int] | None"
"""The steps at which a value is needed; ``None`` for all."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some nodes of a body that become one loop, evaluated at ``steps``."""

    recurrence: bool
    nodes: tuple[fx.Node, ...]
    steps: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Delayed:
    """``base`` at step ``t - distance``; for ``t < distance``, operand ``init[t]``.

    ``uniform`` says that initial and later values are laid out alike, so that they may be stacked together.
    """

    base: fx.Node
    distance: int
    init: tuple[int, ...]
    uniform: bool


@dataclass
class Distribution:
    """The blocks of one loop, in order, and the questions that emitting them asks."""

    loop: Loop
    operands: tuple[Spec, ...]
    equations: Equations
    live: frozenset[fx.Node]
    representative: dict[fx.Node, fx.Node]
    recurrences: frozenset[fx.Node]
    blocks: tuple[Block, ...] = ()
    home: dict[fx.Node, int] = field(default_factory=dict)

    def is_source(self, node: fx.Node) -> bool:
        """Whether ``node`` is computed outside all blocks: a scan, table, literal or anything invariant."""
        return node in self.equations.invariant or (
            node.op == "placeholder" and not isinstance(self.equations.bindings[node], Carried)
        )

    def in_cycle(self, node: fx.Node) -> bool:
        """Whether ``node`` belongs to a recurrence."""
        return self.representative.get(node) in self.recurrences

    def delayed(self, placeholder: fx.Node) -> Delayed | None:
        """Follow a carried placeholder to what it delays, through carries outside recurrences.

        ``None`` where the placeholder is one of a recurrence and can be handed out by it as it is.
        """
        if self.in_cycle(placeholder) and self._uniform(placeholder):
            return None
        outputs = body_outputs(self.loop.body)
        node, distance, uniform = placeholder, 0, True
        init: tuple[int, ...] = ()
        while True:
            binding = self.equations.bindings.get(node)
            if not isinstance(binding, Carried) or (self.in_cycle(node) and self._uniform(node)):
                break
            uniform = uniform and self._uniform(node)
            distance, init, node = distance + binding.distance, (*init, *binding.init), outputs[binding.output]
        trip_count = self.loop.trip_count
        return Delayed(node, min(distance, trip_count), init[:trip_count], uniform)

    def _uniform(self, placeholder: fx.Node) -> bool:
        binding = self.equations.bindings[placeholder]
        assert isinstance(binding, Carried)
        later = spec_of(body_outputs(self.loop.body)[binding.output])
        initial = [self.operands[i] for i in binding.init]
        return isinstance(later, TensorSpec) and all(
            isinstance(s, TensorSpec) and same_layout(s, later) for s in initial
        )

    def is_copied(self, node: fx.Node) -> bool:
        """Whether a block that reads ``node`` of another block recomputes it: a view about as large as its base."""
        base, seen_view = node, False
        while True:
            part = base.target is operator.getitem and is_view(base.all_input_nodes[0])
            if not is_view(base) and not part:
                break
            inputs = [n for n in base.all_input_nodes if not self._is_literal(n)]
            if len(inputs) != 1:
                return False
            base, seen_view = inputs[0], True
        return seen_view and (self.is_source(base) or elements(spec_of(base)) <= _LIGHT * elements(spec_of(node)))

    def is_few(self, block: Block) -> bool:
        """Whether ``block`` is evaluated at so few steps that what it reads is handed to it one by one."""
        return len(block.steps) == 1 or len(block.steps) <= min(FEW, self.loop.trip_count // 2)

    def _is_literal(self, node: fx.Node) -> bool:
        return isinstance(self.equations.bindings.get(node), Literal)


def _live_nodes(loop: Loop, equations: Equations) -> frozenset[fx.Node]:
    outputs = body_outputs(loop.body)
    roots = {outputs[result.output] for result in loop.results}
    roots.update(n for n in loop.body.graph.nodes if n.op != "output" and is_effect(n))
    live = set(roots)
    for root in roots:
        live |= nx.ancestors(equations.graph, root)
    return frozenset(live)


def _representatives(
    loop: Loop, equations: Equations, live: frozenset[fx.Node], stack_limit: int
) -> tuple[dict[fx.Node, fx.Node], frozenset[fx.Node]]:
    """Return the node that stands for each node's group, and which of those stand for recurrences."""
    representative: dict[fx.Node, fx.Node] = {}
    recurrences = set()
    for component in equations.recurrences:
        if component.nodes[0] in live:
            recurrences.add(component.nodes[0])
            representative.update(dict.fromkeys(component.nodes, component.nodes[0]))
    for node in loop.body.graph.nodes:
        if node in representative or node not in live or node.op == "placeholder" or node in equations.invariant:
            continue
        representative[node] = node
        inputs = [n for n in node.all_input_nodes if n in representative]
        if node.target is operator.getitem or (is_view(node) and inputs and representative[inputs[0]] in recurrences):
            representative[node] = representative[inputs[0]]
            continue
        for value in inputs:
            owner = representative[value]
            heavy = loop.trip_count * size_in_bytes(spec_of(value)) > stack_limit
            light = _LIGHT * size_in_bytes(spec_of(node)) <= size_in_bytes(spec_of(value))
            if owner in recurrences and heavy and light and not is_effect(node):
                others = [n for n in node.all_input_nodes if representative.get(n) is not owner]
                if not _reaches(equations, representative, owner, others):
                    representative[node] = owner
                    break
    return representative, frozenset(recurrences)


def _reaches(
    equations: Equations, representative: dict[fx.Node, fx.Node], owner: fx.Node, targets: list[fx.Node]
) -> bool:
    """Whether one of ``targets`` depends on the group of ``owner``, as the groups are now."""
    contracted = nx.DiGraph()
    for a, b in equations.graph.edges:
        contracted.add_edge(representative.get(a, a), representative.get(b, b))
    return any(nx.has_path(contracted, owner, representative.get(n, n)) for n in targets if n in contracted)


def _groups(distribution: Distribution) -> nx.MultiDiGraph:
    """Return the graph of groups: an edge ``a -> b`` says that ``b`` reads ``a``, ``delay`` steps before."""
    representative = distribution.representative
    groups = nx.MultiDiGraph()
    for node in distribution.loop.body.graph.nodes:
        if node not in representative:
            continue
        reader = representative[node]
        groups.add_node(reader)
        for used in node.all_input_nodes:
            delay, value = 0, used
            if used.op == "placeholder" and not distribution.is_source(used) and representative.get(used) is not reader:
                behind = distribution.delayed(used)
                if behind is not None:
                    delay, value = behind.distance, behind.base
            owner = representative.get(value)
            if owner is not None and owner is not reader:
                groups.add_edge(owner, reader, delay=delay)
    return groups


def _stages(groups: nx.MultiDiGraph, order: list[fx.Node], recurrences: frozenset[fx.Node]) -> dict[fx.Node, int]:
    stages: dict[fx.Node, int] = {}
    for group in order:
        stage = 0
        for before, _, delay in groups.in_edges(group, data="delay"):
            # A map cannot read itself at another step, nor a recurrence that comes after it in its stage.
            later = group not in recurrences and (delay > 0 or before in recurrences)
            stage = max(stage, stages[before] + later)
        stages[group] = stage
    return stages


def _needs(distribution: Distribution, groups: nx.MultiDiGraph, order: list[fx.Node]) -> dict[fx.Node, Need]:
    loop, representative = distribution.loop, distribution.representative
    steps: dict[fx.Node, set[int]] = {group: set() for group in order}
    everywhere = set(distribution.recurrences)
    everywhere.update(representative[n] for n in representative if is_effect(n))
    outputs = body_outputs(loop.body)
    for result in loop.results:
        node, step = outputs[result.output], result.step if isinstance(result, Step) else None
        while node.op == "placeholder" and not distribution.is_source(node):
            behind = distribution.delayed(node)
            if behind is None or (step is not None and step < behind.distance):
                break
            node, step = behind.base, None if step is None else step - behind.distance
        if node in representative:
            if step is None:
                everywhere.add(representative[node])
            else:
                steps[representative[node]].add(step)
    for group in reversed(order):
        if len(steps[group]) > min(FEW, loop.trip_count // 2):
            everywhere.add(group)
        for before, _, delay in groups.in_edges(group, data="delay"):
            if group in everywhere:
                everywhere.add(before)
            else:
                steps[before].update(step - delay for step in steps[group] if step >= delay)
    return {group: None if group in everywhere else frozenset(steps[group]) for group in order}


def distribute(loop: Loop, operands: tuple[Spec, ...], *, stack_limit: int) -> Distribution:
    """Return the blocks of ``loop`` in the order in which they run.

    Args:
        loop: A loop whose every result is used.
        operands: Specs of its operands.
        stack_limit: Bytes that one value, kept for all steps, may take before its small readers join the recurrence
            that makes it.
    """
    equations = equations_of(loop)
    live = _live_nodes(loop, equations)
    representative, recurrences = _representatives(loop, equations, live, stack_limit)
    distribution = Distribution(loop, operands, equations, live, representative, recurrences)
    groups = _groups(distribution)
    position = {node: i for i, node in enumerate(loop.body.graph.nodes)}
    order = list(nx.lexicographical_topological_sort(nx.DiGraph(groups), key=position.__getitem__))
    stages = _stages(groups, order, recurrences)
    needs = _needs(distribution, groups, order)

    everything = tuple(range(loop.trip_count))
    members: dict[tuple[int, int, int, Need], list[fx.Node]] = {}
    for node in loop.body.graph.nodes:
        if node not in representative:
            continue
        group = representative[node]
        need = needs[group]
        if group in recurrences:
            key: tuple[int, int, int, Need] = (stages[group], 2, order.index(group), None)
        elif need is None:
            key = (stages[group], 0, 0, None)
        elif need:
            # Where sets of steps differ within a stage, a producer's contains its reader's.
            key = (stages[group], 1, -len(need), need)
        else:
            continue
        members.setdefault(key, []).append(node)
    blocks: list[Block] = []
    for key in sorted(members, key=lambda k: (k[:3], sorted(k[3] or ()))):
        steps = everything if key[3] is None else tuple(sorted(key[3]))
        distribution.home.update(dict.fromkeys(members[key], len(blocks)))
        blocks.append(Block(key[1] == 2, tuple(members[key]), steps))
    distribution.blocks = tuple(blocks)
    return distribution
