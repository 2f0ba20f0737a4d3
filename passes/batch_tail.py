"""Running the per-step part of a sampling loop for all steps at once: not a pass, but what collapse_sampling asks for.

A tail that carries nothing is a map, and is batched as maps are. One that carries something beside the array (a last
token, flags of samples that are done) is split into its components first: what is independent runs for all steps at
once, and only the carried part in order::

    tail(logits, noise, done)    ->    map(logits, noise) -> recurrence(map[0], done) -> map(...)
"""

from __future__ import annotations

import logging
import operator
from typing import TYPE_CHECKING

from torch import fx

from fxjacobi.assemble import assemble
from fxjacobi.batched import BatchedMap
from fxjacobi.emit import dense_stride
from fxjacobi.equations import body_outputs
from fxjacobi.exactness import choose_ways
from fxjacobi.graph import Spec, TensorSpec, spec_of, stamp
from fxjacobi.loops import Carried, Invariant, Kind, Loop, Scanned
from fxjacobi.passes.batch_equations import BatchEquations
from fxjacobi.passes.script_loops import ScriptLoops
from fxjacobi.passes.split_components import SplitComponents

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["batch_tail"]

_log = logging.getLogger(__name__)


def batch_tail(tail: Loop, *, exact: bool) -> nn.Module:
    """Return a module of the same operands and results that runs all steps at once where the bits allow.

    Args:
        tail: A loop whose operands are one a binding, in order, and whose results are all stacked.
        exact: Whether its bits must be those of the single steps.
    """
    operands = _operands(tail)
    if tail.kind is not Kind.MAP:
        return _split(tail, operands, exact=exact)
    known: list[Spec | torch.Tensor] = list(operands)
    batching = choose_ways(tail, known, exact=exact)
    _log.debug("tail: %s", batching)
    return tail if batching.module is None else BatchedMap(tail, batching.module, batching.reason)


def _operands(tail: Loop) -> list[Spec]:
    placeholders = [node for node in tail.body.graph.nodes if node.op == "placeholder"]
    operands: list[Spec] = []
    for node, binding in zip(placeholders, tail.bindings, strict=True):
        spec = spec_of(node)
        if isinstance(binding, Scanned) and isinstance(spec, TensorSpec):
            shape = (tail.trip_count, *spec.shape)
            operands.append(TensorSpec(shape, spec.dtype, spec.device, dense_stride(shape)))
        elif isinstance(binding, (Invariant, Carried)):
            operands.append(spec)
    return operands


def _split(tail: Loop, operands: list[Spec], *, exact: bool) -> nn.Module:
    graph = fx.Graph()
    arguments = [stamp(graph.placeholder(f"operand_{i}"), spec) for i, spec in enumerate(operands)]
    specs: list[Spec] = []
    for node in body_outputs(tail.body):
        spec = spec_of(node)
        assert isinstance(spec, TensorSpec)
        shape = (tail.trip_count, *spec.shape)
        specs.append(TensorSpec(shape, spec.dtype, spec.device, dense_stride(shape)))
    call = stamp(graph.call_module("tail", tuple(arguments)), tuple(specs))
    parts = (stamp(graph.call_function(operator.getitem, (call, i)), spec) for i, spec in enumerate(specs))
    graph.output(tuple(parts))
    module = assemble(graph, fx.GraphModule({"tail": tail}, fx.Graph()), {"tail": tail})
    for each in (SplitComponents(), BatchEquations(exact=exact), ScriptLoops()):
        module = each.run(module).module
    return module
