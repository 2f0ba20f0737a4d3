"""Put the graphs of recorded submodules where they are called."""

from __future__ import annotations

import operator
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import fx

from fxjacobi.assemble import assemble
from fxjacobi.graph import stamp
from fxjacobi.loops import Loop

if TYPE_CHECKING:
    from torch import nn

__all__ = ["expand", "inline_calls"]


def inline_calls(module: fx.GraphModule, *, only_single: bool) -> fx.GraphModule:
    """Return ``module`` with its calls of plain graph modules replaced by what they do (``module`` if it has none).

    Fires on ``call_module`` nodes whose submodule is a :class:`torch.fx.GraphModule` that reads no attribute of its
    own and whose result is only unpacked; with ``only_single``, on submodules called from one place. Loops stay.
    Calls within inlined graphs are inlined too.
    """
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    submodules = {node: module.get_submodule(str(node.target)) for node in calls}
    times = Counter(id(submodule) for submodule in submodules.values())
    chosen = {
        node: submodule
        for node, submodule in submodules.items()
        if isinstance(submodule, fx.GraphModule)
        and not (only_single and times[id(submodule)] > 1)
        and not any(inner.op == "get_attr" for inner in submodule.graph.nodes)
        and all(user.target is operator.getitem for user in node.users)
    }
    if not chosen:
        return module
    graph = fx.Graph()
    new: dict[str, nn.Module] = {}
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node in chosen:
            values[node] = expand(graph, chosen[node], [values[argument] for argument in node.args], new)
        elif node.target is operator.getitem and node.args[0] in chosen:
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
            if node.op == "call_module":
                submodule = submodules[node]
                values[node].target = _name(new, submodule, str(node.target))
    return inline_calls(assemble(graph, module, new), only_single=only_single)


def expand(graph: fx.Graph, module: fx.GraphModule, arguments: list[Any], new: dict[str, nn.Module]) -> tuple[Any, ...]:
    """Copy ``module``'s nodes to the end of ``graph`` and return its results.

    Args:
        graph: What they are copied to.
        module: A graph that reads no attribute of its own.
        arguments: The values of its placeholders, in order.
        new: The submodules that ``graph`` calls, by name; those that ``module`` calls are added.
    """
    values: dict[fx.Node, Any] = {}
    remaining = iter(arguments)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = next(remaining)
        elif node.op == "output":
            results = fx.map_arg(node.args[0], values.__getitem__)
            assert isinstance(results, tuple)
            return results
        else:
            values[node] = copy = graph.node_copy(node, values.__getitem__)
            stamp(copy, node.meta["spec"], node.meta.get("site"))
            if node.op == "call_module":
                copy.target = _name(new, module.get_submodule(str(node.target)), str(node.target))
    raise AssertionError("a graph without an output")


def _name(new: dict[str, nn.Module], submodule: nn.Module, wanted: str) -> str:
    """A name for ``submodule`` that no other submodule has, like ``wanted``."""
    name = wanted
    kind = "loop" if isinstance(submodule, Loop) else wanted
    count = 0
    while name in new and new[name] is not submodule:
        name = f"{kind}_{count}"
        count += 1
    new[name] = submodule
    return name
