"""Choosing how each operation of a map runs batched: the fastest way whose bits are those of the single steps.

Nothing is believed. The map's body is run step by step on random data of the real shapes and layouts, and every known
way of every operation is run on the same data, batched; a way that differs anywhere in a bit is out (NaN matches NaN).
Values flow on as the ways chosen so far leave them, so what is measured has the layouts that the emitted graph has.

In tolerance mode the fastest way is taken whatever its rounding; a way that is wrong by more than rounding is out.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxjacobi import ops
from fxjacobi.batched import select_each
from fxjacobi.emit import elements, rebuilt, same_layout, size_in_bytes
from fxjacobi.equations import body_outputs
from fxjacobi.graph import Spec, TensorSpec, spec_of, spec_of_value, stamp
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked, Step, Table
from fxjacobi.measuring import (
    Batcher,
    Choice,
    Frame,
    Target,
    Trial,
    Unmeasurable,
    Value,
    same_values,
    seconds_of,
    stamp_all,
)
from fxjacobi.samples import sample_operands
from fxjacobi.ways import Role, ways_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from fxjacobi.measuring import Candidates

__all__ = ["Batching", "Choice", "Trial", "choose_ways", "same_values"]

_ELEMENTS = 1 << 14
"""A way that differs in one element of a hundred is missed once in 10^70 by so many elements."""

_SAMPLED_STEPS = 64
_MEMORY = 1 << 31


@dataclass(frozen=True, slots=True)
class Batching:
    """What :func:`choose_ways` found.

    Args:
        module: The graph of all equations, from the loop's operands to its results; ``None`` where there is none.
        choices: One for each operation of the body.
        batched_s: Measured seconds of one run of ``module``.
        sequential_s: Measured seconds of the steps one after another.
        reason: What was chosen, or why nothing was.
    """

    module: fx.GraphModule | None
    choices: tuple[Choice, ...]
    batched_s: float
    sequential_s: float
    reason: str

    def __str__(self) -> str:
        lines = [self.reason]
        for choice in self.choices:
            lines.append(f"  {choice.node} ({choice.operation}): {choice.way.name.lower()}")
            for trial in choice.trials:
                verdict = "equal" if trial.equal else "differs"
                note = f" ({trial.note})" if trial.note else ""
                lines.append(f"    {trial.way.name.lower():15} {trial.seconds * 1e6:10.1f} us  {verdict}{note}")
        return "\n".join(lines)


def _bind(loop: Loop, operands: list[list[Any]], target: Target) -> dict[fx.Node, Value]:
    """Return the values of the body's placeholders over all steps, on each replica, and emit them."""
    graph, steps = target.graph, loop.trip_count
    emitted = [stamp(graph.placeholder(f"operand_{i}"), spec_of_value(v)) for i, v in enumerate(operands[0])]
    aligned = [loop.align(values) for values in operands]
    placeholders = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
    values: dict[fx.Node, Value] = {}
    for node, binding in zip(placeholders, loop.bindings, strict=True):
        match binding:
            case Invariant(operand):
                whole = [o[operand] for o in operands]
                values[node] = Value(Role.UNIFORM, whole, lambda r, _t, b=binding: operands[r][b.operand], emitted[operand])  # type: ignore[misc]
            case Literal(literals):
                values[node] = Value(Role.LITERAL, [], lambda _r, t, b=binding: b.values[t], tuple(literals))  # type: ignore[misc]
            case Table(table):
                whole = [torch.stack([o[i] for i in table]) for o in operands]
                stacked = graph.call_function(torch.ops.aten.stack.default, ([emitted[i] for i in table],))
                stamp(stacked, spec_of_value(whole[0]))
                values[node] = Value(Role.BATCHED, whole, lambda r, t, b=binding: operands[r][b.operands[t]], stacked)  # type: ignore[misc]
            case Scanned():
                way = _scanning(binding, operands[0][binding.operand], steps)
                whole = [way(o[binding.operand]) for o in operands]
                stamp_all(way, [operands[0][binding.operand]])
                value = target.inline(way, [emitted[binding.operand]], node)
                values[node] = Value(
                    Role.BATCHED, whole, lambda r, t, b=binding: aligned[r][b.operand].select(b.dim, b.indices[t]), value  # type: ignore[misc]
                )
            case Carried():
                raise Unmeasurable("the loop carries values from step to step")
    return values


def _scanning(binding: Scanned, operand: torch.Tensor, steps: int) -> fx.GraphModule:
    """Return the graph from a scanned operand to its slices, ``(T, ...)``: a view where the steps are evenly spaced."""
    graph, aten = fx.Graph(), torch.ops.aten
    value, size = graph.placeholder("operand"), operand.shape[binding.dim]
    indices = [i % size for i in binding.indices]
    stride = indices[1] - indices[0] if steps > 1 else 1
    if stride > 0 and indices == list(range(indices[0], indices[0] + stride * steps, stride)):
        if len(indices) != size:
            value = graph.call_function(aten.slice.Tensor, (value, binding.dim, indices[0], indices[-1] + 1, stride))
        if binding.dim:
            value = graph.call_function(aten.movedim.int, (value, binding.dim, 0))
    else:
        value = graph.call_function(select_each, (value, binding.dim, tuple(indices)))
    graph.output(value)
    return fx.GraphModule({}, graph)


def _results(loop: Loop, outputs: Sequence[Value], batcher: Batcher, target: Target) -> list[Any]:
    """Emit the loop's results; single steps keep the layout that they have in the loop."""
    graph, aten = target.graph, torch.ops.aten
    nodes = body_outputs(loop.body)
    results = []
    for result in loop.results:
        value = outputs[result.output]
        emitted = batcher.emit_at_all_steps(value, graph)
        whole = batcher.at_all_steps(value, 0)
        match result:
            case Stacked():
                if not whole.is_contiguous():
                    emitted = graph.call_function(aten.contiguous.default, (emitted,))
                    stamp(emitted, spec_of_value(whole.contiguous()))
            case Step(_, step):
                emitted = graph.call_function(aten.select.int, (emitted, 0, step))
                found, wanted = spec_of_value(whole[step]), spec_of(nodes[result.output])
                stamp(emitted, found)
                assert isinstance(found, TensorSpec)
                if isinstance(wanted, TensorSpec) and not same_layout(found, wanted):
                    emitted = stamp(graph.call_function(ops.restride, (emitted, wanted.stride)), wanted)
        results.append(emitted)
    return results


def _sampling(loop: Loop) -> tuple[list[int], int]:
    """Return which steps are run one by one, and on how many replicas of the data."""
    steps = loop.trip_count
    smallest = min(
        (elements(spec_of(n)) for n in loop.body.graph.nodes if n.op.startswith("call") and elements(spec_of(n))), default=1
    )
    count = min(steps, max(_SAMPLED_STEPS, _ELEMENTS // max(smallest, 1)))
    sampled = sorted({*range(min(8, steps)), *range(max(0, steps - 8), steps), *(i * steps // count for i in range(count))})
    replicas = min(8, max(2, -(-_ELEMENTS // (len(sampled) * max(smallest, 1)))))
    return sampled, replicas


def choose_ways(
    loop: Loop, operands: Sequence[Spec | torch.Tensor], *, exact: bool = True, candidates: Candidates = ways_of
) -> Batching:
    """Measure the ways of every operation of a map and return the batched graph with the fastest lawful ones.

    Args:
        loop: A loop without carries.
        operands: For each operand its spec, or the tensor itself where it is known (a parameter).
        exact: Whether the bits must be those of the single steps.
        candidates: The ways to try for an operation; the default knows :class:`fxjacobi.ways.Way`.
    """
    steps = loop.trip_count
    memory = steps * sum(size_in_bytes(spec_of(n)) for n in loop.body.graph.nodes if n.op != "output")
    if memory > _MEMORY:
        return Batching(None, (), math.inf, math.inf, f"all {steps} equations at once would take {memory >> 20} MiB")
    sampled, replicas = _sampling(loop)
    batcher = Batcher(steps, replicas, sampled, exact=exact, candidates=candidates)
    target = Target()
    with torch.no_grad():
        try:
            data = [sample_operands(loop, operands, seed) for seed in range(replicas)]
            outputs = Frame(batcher, loop.body, _bind(loop, data, target), target).run()
            module = target.module(_results(loop, outputs, batcher, target))
        except Unmeasurable as obstacle:
            return Batching(None, tuple(batcher.choices), math.inf, math.inf, str(obstacle))
        return _judged(loop, module, data, batcher)


def _judged(loop: Loop, module: fx.GraphModule, data: list[list[Any]], batcher: Batcher) -> Batching:
    """Compare the assembled graph with the loop, in values and in time."""
    choices = tuple(batcher.choices)
    unguarded = _without_guards(module)
    plain = Loop(_without_guards(loop.body), loop.trip_count, loop.bindings, loop.results)
    for operands in data[: 1 if loop.trip_count > _SAMPLED_STEPS else None]:
        if not same_values(tuple(unguarded(*operands)), plain(*operands), exact=batcher.exact):
            return Batching(None, choices, math.inf, math.inf, "the operations together differ from the steps")
    batched_s = seconds_of(lambda: unguarded(*data[0]))
    sequential_s = seconds_of(lambda: plain(*data[0]))
    ways = Counter(choice.way.name.lower().replace("_", " ") for choice in choices)
    taken = ", ".join(f"{count} {way}" for way, count in ways.items())
    times = f"{batched_s * 1e3:.3f} ms for {loop.trip_count} equations, {sequential_s * 1e3:.3f} ms step by step"
    if batched_s >= sequential_s:
        return Batching(None, choices, batched_s, sequential_s, f"batching gains nothing ({taken}): {times}")
    return Batching(module, choices, batched_s, sequential_s, f"{taken}: {times}")


def _without_guards(module: fx.GraphModule) -> fx.GraphModule:
    """Random data does not take the recorded branches; values do not depend on guards."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.target not in ops.GUARDS:
            env[node] = graph.node_copy(node, env.__getitem__)
    return rebuilt(module, graph, {})
