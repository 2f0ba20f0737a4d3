"""Which values within loops lie otherwise in memory at some steps than at the step that their loop's body was made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.layouts import lie_alike
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Scanned, Table
from fxjacobi.placement import rounding_unit

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fxjacobi.passes.memory_effects import Phases

__all__ = ["unsettled"]

_aten = torch.ops.aten

_NEW = frozenset(
    {
        _aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.mv.default,
        _aten.addmv.default, _aten.dot.default, _aten.stack.default, _aten.embedding.default,
        _aten.index_select.default, _aten.full.default,
    }
)  # fmt: skip
"""Operations whose result is a new contiguous tensor however their arguments lie."""


def unsettled(module: fx.GraphModule, phases: Phases) -> set[fx.Node]:
    """Return the nodes of ``module``'s loop bodies, at any depth, whose strides or alignment may change with the step.

    A body is made from one iteration: the specs of its nodes are that iteration's. The first steps of a carry read what
    was there before the loop, which may be a transposed argument; a scanned tensor may have rows of an odd length.

    Args:
        module: The graph around the loops.
        phases: Where the graph's values start.
    """
    found: set[fx.Node] = set()
    for inner, operands in _loops(module):
        _visit(inner, operands, phases, found)
    return found


def _loops(module: fx.GraphModule) -> Iterator[tuple[Loop, Sequence[fx.Node]]]:
    for node in module.graph.nodes:
        if node.op == "call_module":
            called = module.get_submodule(str(node.target))
            if isinstance(called, Loop):
                yield called, node.args


def _visit(loop: Loop, operands: Sequence[fx.Node], phases: Phases, found: set[fx.Node]) -> None:
    placeholders = iter(loop.bindings)
    for node in loop.body.graph.nodes:
        if node.op == "placeholder":
            if _changes(next(placeholders), node, operands, phases, found):
                found.add(node)
        elif node.target not in _NEW and any(each in found for each in node.all_input_nodes):
            found.add(node)
    for inner, arguments in _loops(loop.body):
        _visit(inner, arguments, phases, found)


def _changes(binding: Binding, node: fx.Node, operands: Sequence[fx.Node], phases: Phases, found: set[fx.Node]) -> bool:
    match binding:
        case Literal():
            return False
        case Scanned(operand, dim, _, owned):
            spec = spec_of(operands[operand])
            assert isinstance(spec, TensorSpec)
            step = spec.stride[dim] * spec.dtype.itemsize
            return not owned and (operands[operand] in found or step % rounding_unit(spec.device) != 0)
        case Invariant(operand):
            return operands[operand] in found
        case Carried(_, _, sources) | Table(sources):
            return any(_differs(operands[source], node, phases, found) for source in sources)


def _differs(source: fx.Node, node: fx.Node, phases: Phases, found: set[fx.Node]) -> bool:
    before, spec = spec_of(source), spec_of(node)
    if not isinstance(before, TensorSpec) or not isinstance(spec, TensorSpec):
        return False
    return source in found or not lie_alike(before, spec) or phases(source) % rounding_unit(before.device) != 0
