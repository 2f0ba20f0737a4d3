"""Putting another module in the place of a loop, wherever it stands: not a pass, but what several passes do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx, nn

from fxjacobi.emit import rebuilt
from fxjacobi.loops import Loop
from fxjacobi.passes.base import PassResult

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["replace_blocks"]


def replace_blocks(module: fx.GraphModule, replace: Callable[[Loop, fx.Node], nn.Module]) -> PassResult:
    """Return ``module`` with every loop (innermost first) replaced by ``replace(loop, its node)``."""
    new: dict[str, nn.Module] = {}
    for node in module.graph.nodes:
        target = str(node.target)
        if node.op != "call_module" or target in new:
            continue
        found = module.get_submodule(target)
        result: nn.Module = found
        if isinstance(found, fx.GraphModule):
            result = replace_blocks(found, replace).module
        elif isinstance(found, Loop):
            inner = replace_blocks(found.body, replace)
            loop = found.with_body(inner.module) if inner.modified else found
            result = replace(loop, node)
        if result is not found:
            new[target] = result
    if not new:
        return PassResult(module, False)
    env: dict[fx.Node, fx.Node] = {}
    graph = fx.Graph()
    for node in module.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    return PassResult(rebuilt(module, graph, new), True)
