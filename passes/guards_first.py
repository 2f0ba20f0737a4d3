"""guards_first: branches on what the program is given are checked before everything else.

Fires on guards that rest on inputs alone, through operations that serve nothing but guards::

    before                                      after
    x_1 = write(x_0, f(x_0)[:, 0], (None, 0))   guard(known[1], True)
    guard(known[1], True)                       x_1 = write(x_0, f(x_0)[:, 0], (None, 0))
    x_2 = write(x_1, f(x_1)[:, 2], (None, 2))   x_2 = write(x_1, f(x_1)[:, 2], (None, 2))

so that a loop that skips some of its steps (``if known[t]: continue``) repeats evenly. A guard that does not hold throws
the whole run away wherever it stands. Must not fire on a guard that depends on what the run draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxjacobi import ops
from fxjacobi.assemble import assemble, copy_node
from fxjacobi.equations import is_effect
from fxjacobi.passes.base import Pass, PassResult

__all__ = ["GuardsFirst", "guards_first"]


def _given(module: fx.GraphModule) -> set[fx.Node]:
    """Return the guards that rest on inputs alone, and the operations before them, which serve nothing but guards."""
    serving: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        if node.op == "call_function":
            serves = node.users and not is_effect(node) and all(user in serving for user in node.users)
            if node.target in ops.GUARDS or serves:
                serving.add(node)
    chosen: set[fx.Node] = set()
    for node in module.graph.nodes:
        inputs = node.all_input_nodes
        if node in serving and all(used in chosen or used.op in ("placeholder", "get_attr") for used in inputs):
            chosen.add(node)
    # What was chosen for a guard that stays is not needed early.
    needed: set[fx.Node] = set()
    for node in reversed(module.graph.nodes):
        if node in chosen and (node.target in ops.GUARDS or any(user in needed for user in node.users)):
            needed.add(node)
    return needed


def guards_first(module: fx.GraphModule) -> fx.GraphModule:
    """Return ``module`` with its guards on inputs first, or ``module`` itself if they are."""
    chosen = _given(module)
    late = False
    moved = False
    for node in module.graph.nodes:
        late |= node.op in ("call_function", "call_module") and node not in chosen
        moved |= late and node in chosen
    if not moved:
        return module
    nodes = list(module.graph.nodes)
    first = [node for node in nodes if node.op in ("placeholder", "get_attr")]
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in (*first, *(n for n in nodes if n in chosen), *(n for n in nodes if n not in chosen and n not in first)):
        args = fx.map_arg(node.args, values.__getitem__)
        values[node] = copy_node(graph, node, args, dict(fx.map_arg(node.kwargs, values.__getitem__)))
    return assemble(graph, module)


@dataclass(frozen=True)
class GuardsFirst(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "guards_first"

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Move the graph's own guards."""
        return PassResult.of(guards_first(module), module)
