"""repeated_masks: a mask of zeros and ones is multiplied in once, however often the program does it.

Fires on products with the same mask, a buffer or parameter that holds zeros and ones now::

    before                                   after
                                             guard(all(mask is 0 or 1), True)
    w_1 = w_0 * mask                         w_1 = w_0 * mask
    y_1 = conv(x_1, w_1)                     y_1 = conv(x_1, w_1)
    w_2 = w_1 * mask                         y_2 = conv(x_2, w_1)
    y_2 = conv(x_2, w_2)

as in masked layers that write to their weights (``self.weight.data *= self.mask``): each step of a sampling loop would
have weights of its own. ``(w * m) * m`` has the bits of ``w * m`` for ``m`` in ``{0, 1}``, infinities and NaN included;
that the mask still is one is a guard of every call. Must not fire on a mask that the program computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import torch
from torch import fx

from fxjacobi import ops
from fxjacobi.assemble import assemble
from fxjacobi.emit import call
from fxjacobi.graph import TensorSpec, spec_of, stamp
from fxjacobi.passes.base import Pass, PassResult

__all__ = ["RepeatedMasks", "repeated_masks"]

aten = torch.ops.aten


def _is_mask(value: object) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dtype.is_floating_point
        and bool(((value == 0) | (value == 1)).all())
        and not bool(torch.signbit(value).any())
    )


def _repeated(module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Return the products that multiply a mask in again, each with the product that has it."""
    masked: dict[fx.Node, set[fx.Node]] = {}  # the masks that a node's value is zero outside of
    masks: dict[fx.Node, bool] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target is not aten.mul.Tensor or node.kwargs:
            continue
        for value, mask in (node.args, node.args[::-1]):
            if not isinstance(value, fx.Node) or not isinstance(mask, fx.Node) or mask.op != "get_attr":
                continue
            value = same.get(value, value)
            if mask not in masks:
                masks[mask] = _is_mask(attrgetter(str(mask.target))(module))
            if not masks[mask] or spec_of(value) != spec_of(node):
                continue
            if mask in masked.get(value, ()):
                same[node] = value
            else:
                masked[node] = masked.get(value, set()) | {mask}
            break
    return same


def repeated_masks(module: fx.GraphModule) -> fx.GraphModule:
    """Return ``module`` with each mask multiplied in once, or ``module`` itself if it does so."""
    same = _repeated(module)
    if not same:
        return module
    relied_on = {arg for node in same for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr"}
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    nodes = list(module.graph.nodes)
    given = [node for node in nodes if node.op in ("placeholder", "get_attr")]
    for node in given:
        values[node] = graph.node_copy(node, values.__getitem__)
    for mask in (node for node in given if node in relied_on):
        _guard(graph, values[mask])
    for node in nodes:
        if node in same:
            values[node] = values[same[node]]
        elif node not in values:
            values[node] = graph.node_copy(node, values.__getitem__)
    return assemble(graph, module)


def _guard(graph: fx.Graph, mask: fx.Node) -> None:
    assert isinstance(spec_of(mask), TensorSpec)
    either = call(
        graph,
        aten.bitwise_or.Tensor,
        call(graph, aten.eq.Scalar, mask, 0),
        call(graph, aten.eq.Scalar, mask, 1),
    )
    positive = call(graph, aten.logical_not.default, call(graph, aten.signbit.default, mask))
    holds = call(graph, aten.all.default, call(graph, aten.bitwise_and.Tensor, either, positive))
    stamp(graph.call_function(ops.guard, (holds, True)), None)


@dataclass(frozen=True)
class RepeatedMasks(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "repeated_masks"

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Rewrite the graph's own products (not those in recorded submodules)."""
        return PassResult.of(repeated_masks(module), module)
