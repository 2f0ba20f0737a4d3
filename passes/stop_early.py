"""stop_early: a loop in which nothing changes but its state ends at the first exact repeat of that state.

Fires on every loop of :attr:`fxjacobi.loops.Kind.FIXED_POINT` (after split_components: one component, every binding
a carry or an invariant). Must not fire on a loop with anything per step: its state may repeat and move on. ::

    before                          after
    loop_0 = self.loop_0(x0, y)     loop_0 = self.loop_0(x0, y)     # a FixedPoint, same operands and results
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from fxjacobi.fixed_point import FixedPoint
from fxjacobi.graph import is_random
from fxjacobi.loops import Kind, Loop
from fxjacobi.ops import GUARDS
from fxjacobi.passes.assemble import assemble
from fxjacobi.passes.base import Pass, PassResult

__all__ = ["StopEarly", "stop_early"]


def stop_early(module: fx.GraphModule) -> fx.GraphModule:
    """Return ``module`` with its fixed-point loops replaced by :class:`fxjacobi.fixed_point.FixedPoint`."""
    new = {
        name: FixedPoint(child)
        for name, child in module.named_children()
        if isinstance(child, Loop) and child.kind is Kind.FIXED_POINT and _is_pure(child.body)
    }
    if not new:
        return module
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    return assemble(graph, module, new)


def _is_pure(body: fx.GraphModule) -> bool:
    return not any(is_random(node) or node.target in GUARDS for node in body.graph.nodes)


@dataclass(frozen=True)
class StopEarly(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "stop_early"

    def apply(self, module: fx.GraphModule) -> PassResult:
        result = stop_early(module)
        return PassResult(result, result is not module)
