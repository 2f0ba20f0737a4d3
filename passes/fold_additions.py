"""fold_additions: what a step adds to a product of the state starts that product, so a step makes one call less.

Fires within a loop's body, where rounding may differ, on a sum of a product that reads the state and one that does not::

    before                                         after
    a = addmm(bias_x, x_t, W)                      bias = bias_x + bias_h           (once, before the loop)
    b = addmm(bias_h, h, R)                        a = addmm(bias, x_t, W)          (for all t at once)
    gates = a + b                                  gates = addmm(a, h, R)

Must not fire in the exact contract (the sums are the same up to rounding only), on products that something else reads
too, on scaled ones (``alpha``, ``beta``), or where both or neither reads the state: nothing would be gained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from fxjacobi.assemble import assemble
from fxjacobi.emit import call
from fxjacobi.graph import TensorSpec, site_of, spec_of
from fxjacobi.loops import Carried, Loop
from fxjacobi.passes.base import Pass, PassResult
from fxjacobi.passes.replace_blocks import replace_blocks

__all__ = ["FoldAdditions"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Sum:
    """``gates = known + recurrent``: the product before the loop's state is there, and the one that reads it."""

    known: fx.Node
    recurrent: fx.Node


@dataclass(frozen=True)
class FoldAdditions(Pass):
    """See the module's docstring.

    Args:
        exact: Whether bits count, so that nothing is folded.
    """

    name: ClassVar[str] = "fold_additions"
    exact: bool = True

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Fold the sums of every loop's body."""
        return PassResult(module, False) if self.exact else replace_blocks(module, lambda loop, _: _folded(loop))


def _folded(loop: Loop) -> Loop:
    sums = _sums(loop)
    if not sums:
        return loop
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    replaced = {product for found in sums.values() for product in (found.known, found.recurrent)}
    for node in loop.body.graph.nodes:
        if node in sums:
            known, recurrent = sums[node].known, sums[node].recurrent
            biases = [values[b] for b in _biases(known, recurrent)]
            first, second = (values[f] for f in _factors(known))
            site = site_of(node)
            if biases:
                bias = call(graph, aten.add.Tensor, *biases, site=site) if len(biases) == 2 else biases[0]
                start = call(graph, aten.addmm.default, bias, first, second, site=site)
            else:
                start = call(graph, aten.mm.default, first, second, site=site)
            values[node] = call(graph, aten.addmm.default, start, *(values[f] for f in _factors(recurrent)), site=site)
        elif node not in replaced:
            values[node] = graph.node_copy(node, values.__getitem__)
    return loop.with_body(assemble(graph, loop.body))


def _sums(loop: Loop) -> dict[fx.Node, _Sum]:
    """Return the sums that are folded."""
    reads: set[fx.Node] = set()
    placeholders = (node for node in loop.body.graph.nodes if node.op == "placeholder")
    carried = {p for p, binding in zip(placeholders, loop.bindings, strict=True) if isinstance(binding, Carried)}
    sums: dict[fx.Node, _Sum] = {}
    for node in loop.body.graph.nodes:
        if node in carried or reads.intersection(node.all_input_nodes):
            reads.add(node)
        if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2 or node.args[0] is node.args[1]:
            continue
        if not all(isinstance(a, fx.Node) and _is_product(a, node) for a in node.args):
            continue
        known, recurrent = sorted(node.args, key=lambda a: a in reads)
        biases = _biases(known, recurrent)
        # Biases are added to each other: of different shapes, the smaller would be spread over the larger.
        if known in reads or recurrent not in reads or reads.intersection(biases):
            continue
        if len({_shape(b) for b in biases}) <= 1 and len({spec.dtype for spec in map(_tensor, node.args)}) == 1:
            sums[node] = _Sum(known, recurrent)
    return sums


def _is_product(node: fx.Node, reader: fx.Node) -> bool:
    plain = node.target in (aten.mm.default, aten.addmm.default) and not node.kwargs
    return plain and list(node.users) == [reader] and _shape(node) == _shape(reader)


def _has_bias(product: fx.Node) -> bool:
    return product.target is aten.addmm.default


def _biases(*products: fx.Node) -> list[fx.Node]:
    return [p.args[0] for p in products if _has_bias(p) and isinstance(p.args[0], fx.Node)]


def _factors(product: fx.Node) -> tuple[fx.Node, ...]:
    return tuple(a for a in product.args[_has_bias(product) :] if isinstance(a, fx.Node))


def _tensor(node: object) -> TensorSpec:
    assert isinstance(node, fx.Node)
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec), "products and what they start from are tensors"
    return spec


def _shape(node: object) -> tuple[int, ...]:
    return tuple(_tensor(node).shape)
