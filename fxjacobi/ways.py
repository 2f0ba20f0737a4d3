"""The ways to evaluate one operation for all T steps at once, none of them believed: exactness measures them."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._C import _functorch

from fxjacobi import ops
from fxjacobi.emit import is_dense, rebuilt
from fxjacobi.graph import TensorSpec, spec_of, stamp
from fxjacobi.loops import Invariant, Literal, Loop, Scanned, Stacked
from fxjacobi.lowered import lowered
from fxjacobi.operation import Operation, Role, Way
from fxjacobi.rules import rules, rules_for_literals

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fxjacobi.loops import Binding

__all__ = ["ways_of"]


def ways_of(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
    """Yield each way that is known for ``operation``; the last one always works."""
    found = False
    if operation.node.op == "call_function":
        for way in rules_for_literals(operation) if operation.has_literals else rules(operation):
            found = True
            yield way
        if not found and not operation.has_literals:
            # Tracing costs milliseconds and its imports seconds, so it is left for what no rule covers.
            yield from _mapped(operation)
    yield Way.ONE_BY_ONE, _one_by_one(operation)


def _single(operation: Operation, *, literals: bool = False, relaid: bool = False) -> fx.GraphModule:
    """Return the operation alone as a graph of its inputs: literals too, and each in its own layout, if asked."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in operation.node.all_input_nodes:
        if literals or operation.roles[node] is not Role.LITERAL:
            env[node] = stamp(graph.placeholder(node.name), spec_of(node))
            spec = spec_of(node)
            if relaid and operation.is_batched(node) and isinstance(spec, TensorSpec) and not is_dense(spec):
                # The stack has dense slices; the kernel of a single step saw this layout.
                env[node] = stamp(graph.call_function(ops.restride, (env[node], spec.stride)), spec)
    copy = graph.node_copy(operation.node, env.__getitem__)
    spec = spec_of(operation.node)
    if isinstance(spec, TensorSpec) or spec is None:
        graph.output((copy,))
    else:
        parts = [stamp(graph.call_function(operator.getitem, (copy, i)), part) for i, part in enumerate(spec)]
        graph.output(tuple(part for part in parts if isinstance(spec_of(part), TensorSpec)))
    return rebuilt(operation.owner, graph, {})


def _as_value(operation: Operation, results: Sequence[Any]) -> Any:
    """Return the results of :func:`_single` as the value of the node."""
    spec = spec_of(operation.node)
    if isinstance(spec, TensorSpec):
        return results[0]
    assert spec is not None
    rest = iter(results)
    return tuple(next(rest) if isinstance(part, TensorSpec) else None for part in spec)


def _one_by_one(operation: Operation) -> fx.GraphModule:
    """The operation as a map of its own: its definition."""
    single = _single(operation, literals=True, relaid=True)
    bindings: list[Binding] = []
    for node in operation.node.all_input_nodes:
        match operation.roles[node]:
            case Role.LITERAL:
                bindings.append(Literal(operation.literals[node]))
            case Role.UNIFORM:
                bindings.append(Invariant(operation.inputs.index(node)))
            case Role.BATCHED:
                index = operation.inputs.index(node)
                bindings.append(Scanned(index, 0, range(operation.steps), owned=True))
    count = len(single.graph.output_node().args[0])  # type: ignore[arg-type]
    loop = Loop(single, operation.steps, bindings, [Stacked(i) for i in range(count)])
    graph = fx.Graph()
    call = graph.call_module("one_by_one", tuple(graph.placeholder(n.name) for n in operation.inputs))
    parts = [graph.call_function(operator.getitem, (call, i)) for i in range(count)]
    graph.output(_as_value(operation, parts))
    return fx.GraphModule({"one_by_one": loop}, graph)


def _mapped(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
    """Lower ``torch.func.vmap`` of the operation to ATen operations."""
    single = _single(operation)
    dims = tuple(0 if operation.roles[n] is Role.BATCHED else None for n in operation.inputs)
    examples = []
    for node, dim in zip(operation.inputs, dims, strict=True):
        spec = spec_of(node)
        if not isinstance(spec, TensorSpec):
            return
        shape = spec.shape if dim is None else (operation.steps, *spec.shape)
        stride = spec.stride
        if dim == 0:
            # The batched layout at run time is whatever the ways before leave; vmap is traced for any.
            stride = (max([s * n for s, n in zip(spec.stride, spec.shape, strict=True)], default=1), *spec.stride)
        examples.append(torch.empty_strided(shape, stride, dtype=spec.dtype, device=spec.device).zero_())
    # A fallback would be T calls in disguise. (The setting is private; torch has no public form of it.)
    fallback: Any = _functorch
    enabled = fallback._is_vmap_fallback_enabled()
    fallback._set_vmap_fallback_enabled(False)
    try:
        mapped = lowered(torch.func.vmap(single.forward, dims), *examples)
    except (RuntimeError, NotImplementedError, ValueError, IndexError):
        # An operation without a batching rule, or one that refuses zeros: one way less.
        return
    finally:
        fallback._set_vmap_fallback_enabled(enabled)
    graph = mapped.graph
    if any(node.op == "get_attr" for node in graph.nodes):
        return
    output = graph.output_node()
    output.args = (_as_value(operation, output.args[0]),)  # type: ignore[arg-type]
    mapped.recompile()
    yield Way.MAPPED, mapped
