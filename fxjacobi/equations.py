"""The dependence graph of a loop's body and its strongly connected components: which equations need which.

Nodes of the graph are the body's own ``fx`` nodes. An edge ``a -> b`` says that ``b`` reads ``a``: at the same step
(``distance`` 0), or ``distance`` steps later, when ``a`` is a carried output and ``b`` the placeholder it comes back
through. A component with a cycle is a recurrence; every other node is, by itself, T independent equations
(K. Kennedy and J. Allen, Optimizing Compilers for Modern Architectures, sections 2.2 and 2.4;
arXiv 2002.03629, section 3, for the triangular system).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx
from torch import fx

from fxjacobi import ops
from fxjacobi.graph import is_random
from fxjacobi.loops import Binding, Carried, Invariant, Loop

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Iterator

__all__ = ["Component", "Equations", "body_outputs", "draws", "equations_of", "is_effect", "resting_on"]


@dataclass(frozen=True, slots=True)
class Component:
    """A strongly connected component of a body's dependence graph.

    Args:
        nodes: Its nodes, in the body's order.
        cyclic: Whether it is a recurrence (more than one node, or one that carries itself).
    """

    nodes: tuple[fx.Node, ...]
    cyclic: bool


@dataclass(frozen=True, slots=True)
class Equations:
    """A loop's system of equations, by structure.

    Args:
        graph: ``networkx.DiGraph`` over the body's nodes, edges with ``distance``.
        components: Strongly connected components in topological order, earlier in the body first where both orders do.
        invariant: Nodes whose value is the same at every step, because they read invariants only (placeholders and all).
        bindings: The binding of each placeholder.
    """

    graph: Any
    components: tuple[Component, ...]
    invariant: frozenset[fx.Node]
    bindings: dict[fx.Node, Binding]

    @property
    def recurrences(self) -> tuple[Component, ...]:
        """The components with a cycle."""
        return tuple(component for component in self.components if component.cyclic)


def resting_on(ends: Iterable[fx.Node], stop: Container[fx.Node] = ()) -> set[fx.Node]:
    """Return ``ends`` and all that they rest on; those of ``stop`` are left out, and what is reached only through them."""
    pending = list(ends)
    found: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in found and node not in stop:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def body_outputs(body: fx.GraphModule) -> tuple[Any, ...]:
    """Return the arguments of the body's flat ``output``."""
    outputs: tuple[Any, ...] = body.graph.output_node().args[0]  # type: ignore[assignment]
    return outputs


def _submodules(node: fx.Node) -> Iterator[fx.GraphModule]:
    owner = node.graph.owning_module
    assert owner is not None
    module = owner.get_submodule(str(node.target))
    if isinstance(module, fx.GraphModule):
        yield module
    for child in module.modules():
        if isinstance(child, Loop):
            yield child.body


def is_effect(node: fx.Node) -> bool:
    """Whether ``node`` does more than return a value: a guard, a random draw, or a module that holds one."""
    if node.op == "call_module":
        return any(is_effect(inner) for module in _submodules(node) for inner in module.graph.nodes)
    return node.target in ops.GUARDS or is_random(node)


def draws(module: fx.GraphModule) -> bool:
    """Whether the graph, or a module in it, draws random numbers."""
    return any(
        any(map(draws, _submodules(node))) if node.op == "call_module" else is_random(node)
        for node in module.graph.nodes
    )


def equations_of(loop: Loop) -> Equations:
    """Return the dependence graph of ``loop``'s body, its components and its loop-invariant nodes."""
    nodes = [node for node in loop.body.graph.nodes if node.op != "output"]
    outputs = body_outputs(loop.body)
    bindings = dict(zip((node for node in nodes if node.op == "placeholder"), loop.bindings, strict=True))
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    for node in nodes:
        for used in node.all_input_nodes:
            graph.add_edge(used, node, distance=0)
    for placeholder, binding in bindings.items():
        if isinstance(binding, Carried) and isinstance(outputs[binding.output], fx.Node):
            graph.add_edge(outputs[binding.output], placeholder, distance=binding.distance)

    invariant: set[fx.Node] = set()
    for node in nodes:
        if isinstance(bindings.get(node), Invariant) or (
            node.op != "placeholder" and not is_random(node) and invariant.issuperset(node.all_input_nodes)
        ):
            invariant.add(node)

    position = {node: i for i, node in enumerate(nodes)}
    condensed = nx.condensation(graph)
    first = {index: min(position[node] for node in data["members"]) for index, data in condensed.nodes(data=True)}
    components = []
    for index in nx.lexicographical_topological_sort(condensed, key=first.__getitem__):
        members = tuple(sorted(condensed.nodes[index]["members"], key=position.__getitem__))
        cyclic = len(members) > 1 or graph.has_edge(members[0], members[0])
        components.append(Component(members, cyclic))
    return Equations(graph, tuple(components), frozenset(invariant), bindings)
