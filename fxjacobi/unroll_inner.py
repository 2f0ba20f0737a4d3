"""Writing the small loops inside a loop's body out again: not a pass, but what collapse_sampling asks for.

A network of equal layers inside a sampling loop is rolled into a loop of its own. The causality proof of the outer loop
rests on exact zeros, and the solver watches every node that they pass through; inside an inner loop it cannot. So the
layers are written out, where that stays small.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxjacobi.assemble import assemble
from fxjacobi.graph import Spec, TensorSpec, site_of, spec_of, stamp
from fxjacobi.inline_calls import expand
from fxjacobi.layouts import dense, selected
from fxjacobi.loops import Loop, Scanned, Step, read_at

__all__ = ["unroll_inner"]

_aten = torch.ops.aten
_LARGEST = 4096
"""Operations that the written-out inner loops of a body may have."""


def unroll_inner(loop: Loop) -> Loop:
    """Return ``loop`` with the loops in its body written out, or ``loop`` itself if it has none or they are long."""
    module = loop.body
    inner = {
        node: child
        for node in module.graph.nodes
        if node.op == "call_module" and isinstance(child := module.get_submodule(str(node.target)), Loop)
    }
    if any(n.op == "call_module" for child in inner.values() for n in child.body.graph.nodes):
        return loop  # loops within loops within loops: not seen in a network yet
    size = sum(child.trip_count * len(child.body.graph.nodes) for child in inner.values())
    if not inner or size > _LARGEST or any(u.target is not operator.getitem for node in inner for u in node.users):
        return loop
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node in inner:
            values[node] = _write_out(graph, node, inner[node], [values[a] for a in node.args])
        elif node.target is operator.getitem and node.args[0] in inner:
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    return Loop(assemble(graph, module), loop.trip_count, loop.bindings, loop.results, loop.reason)


def _write_out(graph: fx.Graph, call: fx.Node, loop: Loop, operands: list[Any]) -> tuple[fx.Node, ...]:
    """Append every step of ``loop`` to ``graph`` and return its results."""

    def select(source: fx.Node, scanned: Scanned, index: int) -> fx.Node:
        piece = graph.call_function(_aten.select.int, (source, scanned.dim, index))
        stamp(piece, selected(spec_of(source), scanned.dim), site_of(call))
        return _own(graph, piece, call) if scanned.owned else piece  # it had memory of its own, aligned as such

    outputs: list[tuple[fx.Node, ...]] = []
    for step in range(loop.trip_count):
        bound = [read_at(binding, step, operands, outputs, select) for binding in loop.bindings]
        outputs.append(expand(graph, loop.body, bound, {}))
    results: list[fx.Node] = []
    for result, spec in zip(loop.results, _specs(call), strict=True):
        if isinstance(result, Step):
            results.append(outputs[result.step][result.output])
        else:
            stacked = graph.call_function(_aten.stack.default, ([one[result.output] for one in outputs],))
            results.append(stamp(stacked, spec, site_of(call)))
    return tuple(results)


def _specs(call: fx.Node) -> tuple[Spec, ...]:
    specs = spec_of(call)
    assert isinstance(specs, tuple)
    return specs


def _own(graph: fx.Graph, piece: fx.Node, call: fx.Node) -> fx.Node:
    spec = spec_of(piece)
    assert isinstance(spec, TensorSpec)
    return stamp(graph.call_function(_aten.clone.default, (piece,)), dense(spec, spec.shape), site_of(call))
