"""emit_solvers: name every block by its kind and its place, so that the emitted module reads as its plan.

Fires on every loop and every block that an earlier pass put in a loop's place::

    before                                   after
    loop_0 = self.loop_0(x, w)               map_0 = self.map_0(x, w)
    loop_0_1 = self.loop_0_1(loop_0[0], h)   recurrence_1 = self.recurrence_1(map_0[0], h)

Must not fire on submodules that are no blocks. It changes names only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from fxjacobi.blocks import block_kind, loop_of
from fxjacobi.graph import make_module
from fxjacobi.passes.base import Pass, PassResult

__all__ = ["EmitSolvers", "emit_solvers"]


def emit_solvers(module: fx.GraphModule) -> fx.GraphModule:
    """Return ``module`` with its blocks renamed ``map_0``, ``recurrence_1``, ... in Gauss-Seidel order."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    root = nn.Module()
    count = 0
    for node in module.graph.nodes:
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: copies[n]))
            continue
        copy = copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node.op == "call_module":
            block = module.get_submodule(str(node.target))
            if loop_of(block) is not None:
                copy.target = f"{block_kind(block)}_{count}"
                copy.name = graph._graph_namespace.create_name(copy.target, None)
                count += 1
            root.add_module(str(copy.target), block)
        elif node.op == "get_attr":
            value = getattr(module, str(node.target))
            if isinstance(value, nn.Parameter):
                root.register_parameter(str(node.target), value)
            else:
                setattr(root, str(node.target), value)
    return make_module(root, graph)


@dataclass(frozen=True)
class EmitSolvers(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "emit_solvers"

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Rename."""
        return PassResult(emit_solvers(module), True)
