"""The programs that a collapsed sampling loop runs: prelude once, network once a sweep, tail for all steps at once.

    prelude(invariants)               what neither the array nor a step enters (masked weights, conditioning)
    network(X, invariants, prelude)   what the tail reads of the array, at the shapes of the ordinary run, and a flag
    tail                              a Map loop over the steps: selected elements, noise -> values to write, ...

The flags are NaN exactly if a value that an absorbing constant should have silenced (``0 * x``) was not finite, or an
element of the array or an input is beyond the limit that the proof rests on.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi import ops
from fxjacobi.array_loop import operation_key
from fxjacobi.assemble import assemble
from fxjacobi.causal_rules.finite_masks import limit_flag
from fxjacobi.emit import dense_stride
from fxjacobi.equations import resting_on
from fxjacobi.graph import TensorSpec, site_of, spec_of, stamp
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Scanned, Stacked, Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fxjacobi.array_loop import ArrayLoop
    from fxjacobi.causality_proof import CausalityProof

__all__ = ["Programs", "TailInput", "programs"]

aten = torch.ops.aten


@dataclass(frozen=True, slots=True, eq=False)
class TailInput:
    """Where an operand of the tail comes from.

    Args:
        node: The body's node that it stands for.
        kind: ``"access"`` (selected from the array or the network), ``"step"`` (the loop's own scanned or table
            operand), ``"whole"`` (the same tensor at every step), ``"state"`` (what the step before the first hands on).
    """

    node: fx.Node
    kind: str


@dataclass(frozen=True, eq=False)
class Programs:
    """See the module's docstring.

    Args:
        prelude: ``(invariants...) -> shared``.
        network: ``(array, invariants..., shared...) -> (sources..., flag)``.
        tail: Loop over ``steps`` steps, a Map where the body carries nothing but the array; its results are ``ends``,
            stacked.
        invariants: The body's placeholders that hold the same tensor at every step, in the programs' order.
        shared: Nodes that the prelude computes.
        sources: Nodes that the network computes for the tail.
        inputs: Where the tail's operands come from.
        ends: The nodes whose values the tail returns.
        literals: The tail's bindings to Python values, by place, with the values of all steps.
    """

    prelude: fx.GraphModule
    network: fx.GraphModule
    tail: Loop
    invariants: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]
    sources: tuple[fx.Node, ...]
    inputs: tuple[TailInput, ...]
    ends: tuple[fx.Node, ...]
    literals: dict[int, tuple[Any, ...]]


def programs(proof: CausalityProof, *, steps: int, restrided: bool) -> Programs:
    """Cut a proven loop's body into its programs.

    Args:
        proof: The proof, with the body taken apart.
        steps: How many steps the tail runs at once.
        restrided: Whether selected elements are laid out as the ordinary run's selections are (needed where an
            operation of the tail rounds otherwise for other strides).
    """
    structure = proof.structure
    body = structure.loop.body
    invariants = tuple(node for node, binding in structure.bindings.items() if isinstance(binding, Invariant))
    tail, inputs, literals = _tail(structure, steps, restrided)
    read = [structure.accesses[one.node].source if one.kind == "access" else one.node for one in inputs]
    sources = tuple(dict.fromkeys(node for node in read if node in structure.touched))
    needed = resting_on(sources, stop=structure.versions)
    network_nodes = [node for node in body.graph.nodes if node in needed and node in structure.touched]
    borders = [used for node in network_nodes for used in node.all_input_nodes]
    shared = tuple(
        dict.fromkeys(
            node
            for node in [*borders, *read]
            if node not in structure.touched
            and node not in structure.versions
            and node not in structure.per_step
            and node.op != "placeholder"
        )
    )
    kills = {node for node in body.graph.nodes if node.name in set(proof.kills)}
    limits = proof.limits
    prelude = _program(structure, [], invariants, (), resting_on(shared), shared, kills, limits)
    network = _program(structure, [structure.array], invariants, shared, set(network_nodes), sources, kills, limits)
    return Programs(prelude, network, tail, invariants, shared, sources, inputs, structure.ends, literals)


def _program(
    structure: ArrayLoop,
    first: list[fx.Node],
    invariants: tuple[fx.Node, ...],
    shared: tuple[fx.Node, ...],
    chosen: set[fx.Node],
    results: Sequence[fx.Node],
    kills: set[fx.Node],
    limits: Mapping[str, float],
) -> fx.GraphModule:
    """Copy ``chosen`` into a graph of its own, each operation once, with the flags as last result."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in (*first, *invariants, *shared):
        values[node] = stamp(graph.placeholder(node.name), spec_of(node), site_of(node))
    for version in structure.versions:
        if first:
            # All versions of the array are one: the one that is filled.
            values[version] = values[first[0]]
    known: dict[Any, fx.Node] = {}
    flags: list[fx.Node] = []
    for node in first or invariants:
        if node.name in limits:
            flags.append(limit_flag(graph, values[node], limits[node.name]))
    for node in structure.loop.body.graph.nodes:
        if node in values or node not in chosen or node.op == "output":
            continue
        key = operation_key(node, values) if node.op == "call_function" else node
        if key in known:
            values[node] = known[key]
            continue
        values[node] = known[key] = graph.node_copy(node, values.__getitem__)
        stamp(values[node], spec_of(node), site_of(node))
        if node.name in limits:
            flags.append(limit_flag(graph, values[node], limits[node.name]))
        if node in kills:
            flag = _flag(graph, values[node], spec_of(node))
            if flag is not None:
                flags.append(flag)
    graph.output((*(values[node] for node in results), tuple(flags)))
    return assemble(graph, structure.loop.body)


def _flag(graph: fx.Graph, node: fx.Node, spec: Any) -> fx.Node | None:
    """Add the sum of a float result (NaN if any element is): one pass that writes nothing."""
    if isinstance(spec, tuple):
        node, spec = graph.call_function(operator.getitem, (node, 0)), spec[0]
        stamp(node, spec)
    if not isinstance(spec, TensorSpec) or not (spec.dtype.is_floating_point or spec.dtype.is_complex):
        return None
    total = graph.call_function(aten.sum.default, (node,))
    return stamp(total, TensorSpec((), spec.dtype, spec.device, ()))


def _tail(
    structure: ArrayLoop, steps: int, restrided: bool
) -> tuple[Loop, tuple[TailInput, ...], dict[int, tuple[Any, ...]]]:
    """Build the loop over the per-step part of the body."""
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    bindings: list[Binding] = []
    inputs: list[TailInput] = []
    literals: dict[int, tuple[Any, ...]] = {}
    inside = set(structure.tail)
    entering = dict.fromkeys(
        used
        for node in [*structure.tail, *structure.ends]
        for used in ([node] if node not in inside else node.all_input_nodes)
        if used not in inside
    )
    strided: list[fx.Node] = []
    for node in entering:
        binding = structure.bindings.get(node)
        spec = spec_of(node)
        dense = isinstance(spec, TensorSpec) and spec.stride == dense_stride(spec.shape)
        if node in structure.states:
            values[node] = stamp(graph.placeholder(node.name), spec, site_of(node))
            output = structure.outputs[structure.states[node].output]
            bindings.append(Carried(structure.ends.index(output), 1, (len(inputs),)))
            inputs.append(TailInput(node, "state"))
            continue
        if isinstance(binding, Literal):
            values[node] = stamp(graph.placeholder(node.name), spec, site_of(node))
            literals[len(bindings)] = binding.values
            bindings.append(Literal(binding.values[:steps]))
            continue
        per_step = node in structure.accesses or isinstance(binding, (Scanned, Table))
        if per_step and isinstance(spec, TensorSpec) and not dense:
            packed = TensorSpec(spec.shape, spec.dtype, spec.device, dense_stride(spec.shape))
            values[node] = stamp(graph.placeholder(node.name), packed, site_of(node))
            strided.append(node)
        else:
            values[node] = stamp(graph.placeholder(node.name), spec, site_of(node))
        kind = "access" if node in structure.accesses else "step" if per_step else "whole"
        operand = len(inputs)
        inputs.append(TailInput(node, kind))
        bindings.append(Scanned(operand, 0, range(steps)) if per_step else Invariant(operand))
    if restrided:
        for node in strided:
            spec = spec_of(node)
            assert isinstance(spec, TensorSpec)
            laid_out = graph.call_function(ops.restride, (values[node], spec.stride))
            values[node] = stamp(laid_out, spec, site_of(node))
    for node in structure.tail:
        values[node] = stamp(graph.node_copy(node, values.__getitem__), spec_of(node), site_of(node))
    graph.output(tuple(values[node] for node in structure.ends))
    results = [Stacked(number) for number in range(len(structure.ends))]
    return Loop(assemble(graph, structure.loop.body), steps, bindings, results), tuple(inputs), literals
