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
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi import ops
from fxjacobi.batched import BatchedMap, select_each
from fxjacobi.device.rehearsal import rehearse
from fxjacobi.emit import elements, memory_of, rebuilt, size_in_bytes
from fxjacobi.equations import body_outputs
from fxjacobi.graph import Spec, TensorSpec, spec_of, spec_of_value, stamp, stamp_all
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked, Step, Table
from fxjacobi.measuring import (
    MISFITS,
    Batcher,
    Choice,
    Frame,
    Target,
    Trial,
    Unmeasurable,
    Value,
    same_values,
    seconds_of,
)
from fxjacobi.operation import Role
from fxjacobi.samples import sample_operands
from fxjacobi.timing import started
from fxjacobi.ways import ways_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.loops import Binding
    from fxjacobi.measuring import Candidates

__all__ = ["Batching", "Choice", "Trial", "choose_ways", "same_values"]

_ELEMENTS = 1 << 14
"""A way that differs in one element of a hundred is missed once in 10^70 by so many elements."""

_SAMPLED_STEPS = 64
_FEWEST_RUNS = 32
_BUDGET_S = 1.0
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


def _bind(loop: Loop, operands: list[list[torch.Tensor]], target: Target) -> dict[fx.Node, Value]:
    """Return the values of the body's placeholders over all steps, on each replica, and emit them."""
    emitted = [stamp(target.graph.placeholder(f"operand_{i}"), spec_of_value(v)) for i, v in enumerate(operands[0])]
    placeholders = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
    values: dict[fx.Node, Value] = {}
    for node, binding in zip(placeholders, loop.bindings, strict=True):
        values[node] = _bound(binding, node, loop, operands, emitted, target)
    return values


def _bound(
    binding: Binding,
    node: fx.Node,
    loop: Loop,
    operands: list[list[torch.Tensor]],
    emitted: list[fx.Node],
    target: Target,
) -> Value:
    """Return the value of one placeholder: its data over all steps and at one, and its node."""
    match binding:
        case Invariant(operand):
            return Value(
                Role.UNIFORM, [o[operand] for o in operands], lambda r, _t: operands[r][operand], emitted[operand]
            )
        case Literal(numbers):
            return Value(Role.LITERAL, [], lambda _r, t: numbers[t], tuple(numbers))
        case Table(table):
            whole = [torch.stack([o[i] for i in table]) for o in operands]
            stacked = target.graph.call_function(torch.ops.aten.stack.default, ([emitted[i] for i in table],))
            stamp(stacked, spec_of_value(whole[0]))
            return Value(Role.BATCHED, whole, lambda r, t: operands[r][table[t]], stacked)
        case Scanned(operand, dim, indices):
            way = _scanning(binding, operands[0][operand], loop.trip_count)
            stamp_all(way, [operands[0][operand]])
            value = target.inline(way, [emitted[operand]], node)
            aligned = [loop.align(o)[operand] for o in operands]
            slices = [way(o[operand]) for o in operands]
            return Value(Role.BATCHED, slices, lambda r, t: aligned[r].select(dim, indices[t]), value)
        case Carried():
            raise Unmeasurable("the loop carries values from step to step")


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
    """Emit the loop's results, each in memory of its own; single steps keep the layout that they have in the loop."""
    graph, aten = target.graph, torch.ops.aten
    nodes = body_outputs(loop.body)
    results = []
    taken = {node for node in graph.nodes if node.op == "placeholder"}  # memory that is somebody's already
    for result in loop.results:
        value = outputs[result.output]
        emitted = batcher.emit_at_all_steps(value, graph)
        whole = batcher.at_all_steps(value, 0)
        match result:
            case Stacked():
                if not whole.is_contiguous() or memory_of(emitted) in taken:
                    form: dict[str, Any] = {"memory_format": torch.contiguous_format}
                    emitted = graph.call_function(aten.clone.default, (emitted,), form)
                    stamp(emitted, spec_of_value(whole.contiguous()))
                taken.add(memory_of(emitted))
            case Step(_, step):
                emitted = graph.call_function(aten.select.int, (emitted, 0, step))
                found, wanted = spec_of_value(whole[step]), spec_of(nodes[result.output])
                assert isinstance(found, TensorSpec)
                stamp(emitted, found)
                # A copy: products round by where a row starts, and the caller may write to one result and not to all.
                stride = wanted.stride if isinstance(wanted, TensorSpec) else found.stride
                kept = TensorSpec(found.shape, found.dtype, found.device, stride)
                emitted = stamp(graph.call_function(ops.restride, (emitted, stride)), kept)
        results.append(emitted)
    return results


def _sampling(loop: Loop, operands: list[torch.Tensor]) -> tuple[list[int], int]:
    """Return which steps are run one by one, and on how many replicas of the data: enough elements, in bounded time."""
    steps = loop.trip_count
    computed = (elements(spec_of(n)) for n in loop.body.graph.nodes if n.op.startswith("call"))
    smallest = min((count for count in computed if count), default=1)
    body = _without_guards(loop.body)
    try:
        step_s = seconds_of(lambda: body(*loop.bind(loop.align(operands), 0, ())))
    except MISFITS as misfit:
        raise Unmeasurable(f"the body does not run on random data: {misfit}") from misfit
    runs = max(_FEWEST_RUNS, int(_BUDGET_S / max(step_s, 1e-6)))
    count = min(steps, max(_SAMPLED_STEPS, _ELEMENTS // smallest), runs)
    ends = min(8, -(-count // 4))
    sampled = {
        *range(min(ends, steps)),
        *range(max(0, steps - ends), steps),
        *(i * steps // count for i in range(count)),
    }
    wanted = -(-_ELEMENTS // (len(sampled) * smallest))
    return sorted(sampled), max(1, min(8, max(2, wanted), runs // len(sampled)))


def choose_ways(
    loop: Loop,
    operands: Sequence[Spec | torch.Tensor],
    *,
    exact: bool = True,
    candidates: Candidates = ways_of,
    phases: Sequence[int] = (),
) -> Batching:
    """Measure the ways of every operation of a map and return the batched graph with the fastest lawful ones.

    Args:
        loop: A loop without carries.
        operands: For each operand its spec, or the tensor itself where it is known (a parameter).
        exact: Whether the bits must be those of the single steps.
        candidates: The ways to try for an operation; the default knows :class:`fxjacobi.ways.Way`.
        phases: How far past an aligned address each operand starts, which the bits of a product depend on
            (:mod:`fxjacobi.placement`); aligned unless given.
    """
    steps = loop.trip_count
    memory = steps * sum(size_in_bytes(spec_of(n)) for n in loop.body.graph.nodes if n.op != "output")
    if memory > _MEMORY:
        return Batching(None, (), math.inf, math.inf, f"all {steps} equations at once would take {memory >> 20} MiB")
    if not all(isinstance(operand, (TensorSpec, torch.Tensor)) for operand in operands):
        return Batching(None, (), math.inf, math.inf, "it reads a Python value of the loop around it")
    target, choices = Target(), list[Choice]()
    with torch.no_grad():
        try:
            first = sample_operands(loop, operands, 0, phases)
            _rehearsed(loop, [first])
            sampled, replicas = _sampling(loop, first)
            batcher = Batcher(steps, replicas, sampled, choices, exact=exact, candidates=candidates)
            data = [sample_operands(loop, operands, seed, phases) for seed in range(replicas)]
            _rehearsed(loop, data[1:])
            outputs = Frame(batcher, loop.body, _bind(loop, data, target), target).run()
            module = target.module(_results(loop, outputs, batcher, target))
        except Unmeasurable as obstacle:
            return Batching(None, tuple(choices), math.inf, math.inf, str(obstacle))
        return _judged(loop, module, data, batcher)


def _rehearsed(loop: Loop, data: Sequence[Sequence[torch.Tensor]]) -> None:
    reason = rehearse(loop, data)
    if reason is not None:
        raise Unmeasurable(reason)


def _judged(loop: Loop, module: fx.GraphModule, data: list[list[torch.Tensor]], batcher: Batcher) -> Batching:
    """Compare the assembled graph with the loop, in values and in time."""
    choices = tuple(batcher.choices)
    unguarded = _without_guards(module)
    plain = Loop(_without_guards(loop.body), loop.trip_count, loop.bindings, loop.results)
    sequential_s = math.inf
    for operands in data[: 1 if loop.trip_count > _SAMPLED_STEPS else None]:
        clock = started()
        wanted = plain(*operands)
        sequential_s = min(sequential_s, clock())
        if not same_values(tuple(unguarded(*operands)), wanted, exact=batcher.exact):
            return Batching(None, choices, math.inf, math.inf, "the operations together differ from the steps")
    batched_s = seconds_of(lambda: unguarded(*data[0]))
    if sequential_s < 2 * batched_s:
        sequential_s = min(sequential_s, seconds_of(lambda: plain(*data[0])))
    ways = Counter(choice.way.name.lower().replace("_", " ") for choice in choices)
    taken = ", ".join(f"{count} {way}" for way, count in ways.items())
    times = f"{batched_s * 1e3:.3f} ms for {loop.trip_count} equations, {sequential_s * 1e3:.3f} ms step by step"
    if batched_s >= sequential_s:
        return Batching(None, choices, batched_s, sequential_s, f"batching gains nothing ({taken}): {times}")
    return Batching(module, choices, batched_s, sequential_s, f"{taken}: {times}")


def _without_guards(module: fx.GraphModule) -> fx.GraphModule:
    """Random data does not take the recorded branches, here or in inner loops; values do not depend on guards."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    inner: dict[str, torch.nn.Module] = {}
    for node in module.graph.nodes:
        if node.target not in ops.GUARDS:
            env[node] = graph.node_copy(node, env.__getitem__)
        if node.op == "call_module":
            inner[str(node.target)] = _unguarded(module.get_submodule(str(node.target)))
    return rebuilt(module, graph, inner)


def _unguarded(module: torch.nn.Module) -> torch.nn.Module:
    match module:
        case Loop():
            return Loop(_without_guards(module.body), module.trip_count, module.bindings, module.results, module.reason)
        case BatchedMap():
            return BatchedMap(module.loop, _without_guards(module.batched), module.reason)
        case fx.GraphModule():
            return _without_guards(module)
    return module
