"""Choosing how each operation of a map runs batched: the fastest way whose bits are those of the single steps.

Nothing is believed. The map's body is run step by step on random data of the real shapes and layouts, and every known
way of every operation is run on the same data, batched; a way that differs anywhere in a bit is out (NaN matches NaN).
Values flow on as the ways chosen so far leave them, so what is measured has the layouts that the emitted graph has.

In tolerance mode the fastest way is taken whatever its rounding; a way that is wrong by more than rounding is out.
"""

from __future__ import annotations

import math
import operator
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

from fxjacobi import ops
from fxjacobi.batched import BatchedMap
from fxjacobi.emit import elements, rebuilt, same_layout, size_in_bytes
from fxjacobi.equations import body_outputs
from fxjacobi.graph import Spec, TensorSpec, site_of, spec_of, spec_of_value, stamp
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked, Step, Table
from fxjacobi.samples import sample_operands
from fxjacobi.ways import Operation, Role, Way, ways_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

__all__ = ["Batching", "Choice", "Trial", "choose_ways", "same_values"]

Candidates: TypeAlias = "Callable[[Operation], Iterator[tuple[Way, fx.GraphModule]]]"

_ELEMENTS = 1 << 14
"""A way that differs in one element of a hundred is missed once in 10^70 by so many elements."""

_SAMPLED_STEPS = 64
_MEMORY = 1 << 31

# What an operation raises that cannot run on the data or in the shape it is given; anything else is a defect.
_MISFITS = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Trial:
    """One way of one operation, measured: seconds of one batched call, and whether it may be used."""

    way: Way
    seconds: float
    equal: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The way taken for one node of the body, with all that were tried."""

    node: str
    operation: str
    way: Way
    trials: tuple[Trial, ...]


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


class _Unmeasurable(Exception):  # noqa: N818 - control flow: the map stays a loop, with this reason
    """The body cannot be run on random data, or not within the memory allowed."""


def _bits(value: torch.Tensor) -> torch.Tensor:
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    size = value.element_size()
    return value.resolve_neg().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


def same_values(found: Any, wanted: Any, *, exact: bool) -> bool:
    """Whether ``found`` is ``wanted``: in every bit (any NaN is any other), or up to another order of rounding."""
    if isinstance(wanted, (tuple, list)):
        return len(found) == len(wanted) and all(same_values(f, w, exact=exact) for f, w in zip(found, wanted, strict=True))
    if not isinstance(wanted, torch.Tensor):
        return bool(found == wanted)
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    inexact = wanted.is_floating_point() or wanted.is_complex()
    if exact or not inexact:
        if torch.equal(_bits(found), _bits(wanted)):
            return True
        if not inexact:
            return False
        a, b = (torch.view_as_real(v) if v.is_complex() else v for v in (found.resolve_conj(), wanted.resolve_conj()))
        return bool(((_bits(a) == _bits(b)) | (a.isnan() & b.isnan())).all())
    # Intermediate overflow may differ with the order; only finite elements tell a wrong way from a rounded one.
    finite = found.isfinite() & wanted.isfinite()
    a, b = found[finite], wanted[finite]
    scale = float(b.abs().max()) if b.numel() else 0.0
    bound = math.sqrt(torch.finfo(wanted.dtype).eps) * max(scale, 1.0)
    return bool(((a - b).abs() <= bound).all()) and 2 * int(finite.sum()) >= int(wanted.isfinite().sum())


def _seconds(run: Callable[[], Any]) -> float:
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        if best > 0.02:
            break
    return best


@dataclass
class _Value:
    """One value of the body: its role, its batched values on each replica of the data, and its single steps.

    ``steps(replica, step)`` runs the body as the loop does; it is asked for what a measurement needs and no more.
    """

    role: Role
    batched: list[Any]
    steps: Callable[[int, int], Any]
    emitted: Any


class _Frame:
    """One body on its way into a batched graph: the values of its nodes."""

    def __init__(self, batcher: _Batcher, body: fx.GraphModule, values: dict[fx.Node, _Value], target: _Target) -> None:
        self.batcher, self.body, self.values, self.target = batcher, body, values, target
        self.memory: dict[tuple[fx.Node, int, int], Any] = {}

    def step_value(self, node: fx.Node, replica: int, step: int) -> Any:
        """Return ``node`` at one step, run by itself."""
        pending = [node]
        while pending:
            key = (pending[-1], replica, step)
            missing = [n for n in pending[-1].all_input_nodes if (n, replica, step) not in self.memory]
            if key in self.memory:
                pending.pop()
            elif pending[-1].op == "placeholder":
                self.memory[key] = self.values[pending.pop()].steps(replica, step)
            elif missing:
                pending.extend(missing)
            else:
                self.memory[key] = self._run_step(pending.pop(), replica, step)
        return self.memory[node, replica, step]

    def _run_step(self, node: fx.Node, replica: int, step: int) -> Any:
        args: Any = fx.map_arg(node.args, lambda n: self.memory[n, replica, step])
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: self.memory[n, replica, step])
        function: Any = self.body.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        try:
            return function(*args, **kwargs)
        except _MISFITS as misfit:
            raise _Unmeasurable(f"{node.name} does not run on random data: {misfit}") from misfit

    def run(self) -> tuple[_Value, ...]:
        """Batch every node and return the outputs."""
        for node in self.body.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.values[node] = self.batcher.batch(self, node)
        return tuple(self.values[node] for node in body_outputs(self.body))


class _Target:
    """The graph that grows: all equations together."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}

    def add_module(self, stem: str, module: nn.Module) -> str:
        name = f"{stem}_{len(self.modules)}"
        self.modules[name] = module
        return name

    def inline(self, way: fx.GraphModule, inputs: Sequence[Any], like: fx.Node) -> Any:
        """Append the nodes of ``way``; return its output, a node or a tuple of nodes."""
        env: dict[fx.Node, Any] = {}
        placeholders = (n for n in way.graph.nodes if n.op == "placeholder")
        env.update(zip(placeholders, inputs, strict=True))
        for node in way.graph.nodes:
            if node.op == "placeholder":
                continue
            args: Any = fx.map_arg(node.args, lambda n: env[n])
            kwargs: Any = fx.map_arg(node.kwargs, lambda n: env[n])
            if node.op == "output":
                return args[0]
            target = node.target
            if node.op == "call_module":
                target = self.add_module(f"{like.name}_step_by_step", way.get_submodule(str(target)))
            env[node] = self.graph.create_node(node.op, target, args, kwargs)
            stamp(env[node], node.meta.get("spec"), site_of(like))
        raise AssertionError(way.code)

    def module(self, outputs: Sequence[Any]) -> fx.GraphModule:
        self.graph.output(tuple(outputs))
        self.graph.eliminate_dead_code(lambda n: n.op == "output" or n.target in ops.GUARDS or n.op == "placeholder")
        return rebuilt(fx.GraphModule({}, fx.Graph()), self.graph, self.modules)


class _Batcher:
    """The measuring of one map."""

    def __init__(self, steps: int, replicas: int, sampled: Sequence[int], *, exact: bool, candidates: Candidates) -> None:
        self.steps, self.replicas, self.sampled = steps, replicas, tuple(sampled)
        self.exact, self.candidates = exact, candidates
        self.choices: list[Choice] = []

    def batch(self, frame: _Frame, node: fx.Node) -> _Value:
        """Return the value of ``node`` at all steps, appending to the frame's graph what computes it."""
        values = frame.values
        inputs = [values[n] for n in node.all_input_nodes]
        if node.target in ops.GUARDS:
            return self._guard(frame, node)
        if node.target is operator.getitem and inputs[0].role is not Role.LITERAL:
            whole, index = inputs[0], node.args[1]
            parts = whole.emitted
            emitted = parts[index] if isinstance(parts, tuple) else frame.target.graph.call_function(operator.getitem, (parts, index))
            return self._value(frame, node, whole.role, [b[index] for b in whole.batched], emitted)
        if node.op == "call_module":
            module = frame.body.get_submodule(str(node.target))
            if isinstance(module, BatchedMap):
                module = module.batched
            if isinstance(module, fx.GraphModule):
                return self._inlined(frame, node, module)
        if all(value.role is Role.UNIFORM for value in inputs):
            return self._uniform(frame, node)
        return self._measured(frame, node)

    def _value(self, frame: _Frame, node: fx.Node, role: Role, batched: list[Any], emitted: Any) -> _Value:
        return _Value(role, batched, lambda replica, step: frame.step_value(node, replica, step), emitted)

    def _guard(self, frame: _Frame, node: fx.Node) -> _Value:
        """Guards run on final values: all steps in one comparison where the guarded value is batched."""
        value, expected = node.args[0], node.args[1]
        assert isinstance(value, fx.Node)
        literal = frame.values[expected].emitted if isinstance(expected, fx.Node) else (expected,) * self.steps
        found, graph = frame.values[value], frame.target.graph
        if found.role is Role.UNIFORM:
            for wanted in dict.fromkeys(literal):
                stamp(graph.call_function(node.target, (found.emitted, wanted)), None, site_of(node))  # type: ignore[arg-type]
        elif node.target is ops.guard:
            stamp(graph.call_function(ops.guard_steps, (found.emitted, literal)), None, site_of(node))
        else:
            raise _Unmeasurable(f"{node.name} guards more than one number a step")
        return _Value(Role.UNIFORM, [None] * self.replicas, lambda _replica, _step: None, None)

    def _uniform(self, frame: _Frame, node: fx.Node) -> _Value:
        values, target = frame.values, node.target
        if node.op == "call_module":
            target = frame.target.add_module(node.name, frame.body.get_submodule(str(target)))
        args: Any = fx.map_arg(node.args, lambda n: values[n].emitted)
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: values[n].emitted)
        emitted = stamp(frame.target.graph.create_node(node.op, target, args, kwargs), spec_of(node), site_of(node))
        batched = [frame.step_value(node, replica, self.sampled[0]) for replica in range(self.replicas)]
        return self._value(frame, node, Role.UNIFORM, batched, emitted)

    def _inlined(self, frame: _Frame, node: fx.Node, module: fx.GraphModule) -> _Value:
        """A submodule recorded once is batched like the body that calls it."""
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        values = dict(zip(placeholders, (frame.values[n] for n in node.args), strict=True))  # type: ignore[index]
        outputs = _Frame(self, module, values, frame.target).run()
        batched = [tuple(self._at_all_steps(o, replica) for o in outputs) for replica in range(self.replicas)]
        emitted = tuple(self._emit_at_all_steps(o, frame.target.graph) for o in outputs)
        return self._value(frame, node, Role.BATCHED, batched, emitted)

    def _at_all_steps(self, value: _Value, replica: int) -> Any:
        tensor = value.batched[replica]
        return tensor if value.role is Role.BATCHED else tensor.expand(self.steps, *tensor.shape)

    def _emit_at_all_steps(self, value: _Value, graph: fx.Graph) -> Any:
        if value.role is Role.BATCHED:
            return value.emitted
        shape = [self.steps, *value.batched[0].shape]
        return stamp(
            graph.call_function(torch.ops.aten.expand.default, (value.emitted, shape)),
            spec_of_value(self._at_all_steps(value, 0)),
        )

    def _measured(self, frame: _Frame, node: fx.Node) -> _Value:
        """Run every way of one operation on what the ways before left, and keep the fastest lawful one."""
        values = frame.values
        if not any(isinstance(part, TensorSpec) for part in _parts(spec_of(node))):
            raise _Unmeasurable(f"{node.name} is a Python value")
        roles = {n: values[n].role for n in node.all_input_nodes}
        literals = {n: values[n].emitted for n, role in roles.items() if role is Role.LITERAL}
        operation = Operation(node, self.steps, roles, literals, frame.body)
        inputs = [[values[n].batched[replica] for n in operation.inputs] for replica in range(self.replicas)]
        key = self._key(operation, inputs[0])
        known = _CACHE.get(key) if key is not None else None
        trials: list[Trial] = []
        best: tuple[float, fx.GraphModule, list[Any]] | None = None
        for way, module in self.candidates(operation):
            if known is not None and way is not known.way:
                continue
            trial, outputs = self._try(frame, operation, way, module, inputs, believe=known is not None)
            trials.append(trial)
            if trial.equal and (best is None or trial.seconds < best[0]):
                best = trial.seconds, module, outputs
        if best is None:
            raise _Unmeasurable(f"no way of running {node.name} keeps its bits, not even step by step")
        chosen = min((t for t in trials if t.equal), key=lambda t: t.seconds)
        choice = Choice(node.name, str(node.target), chosen.way, known.trials if known is not None else tuple(trials))
        if key is not None and known is None:
            _CACHE[key] = choice
        self.choices.append(choice)
        _, module, outputs = best
        _stamp_all(module, inputs[0])
        emitted = frame.target.inline(module, [values[n].emitted for n in operation.inputs], node)
        return self._value(frame, node, Role.BATCHED, outputs, emitted)

    def _try(
        self,
        frame: _Frame,
        operation: Operation,
        way: Way,
        module: fx.GraphModule,
        inputs: list[list[Any]],
        *,
        believe: bool,
    ) -> tuple[Trial, list[Any]]:
        outputs = []
        for replica, tensors in enumerate(inputs):
            try:
                found = module(*tensors)
            except _MISFITS as misfit:
                return Trial(way, math.inf, False, str(misfit).splitlines()[0] if str(misfit) else repr(misfit)), []
            if not believe and not self._agrees(frame, operation.node, found, replica):
                return Trial(way, math.inf, False, "other bits" if self.exact else "other values"), []
            outputs.append(found)
        return Trial(way, _seconds(lambda: module(*inputs[0])), True), outputs

    def _agrees(self, frame: _Frame, node: fx.Node, found: Any, replica: int) -> bool:
        for step in self.sampled:
            wanted = frame.step_value(node, replica, step)
            if not same_values(_at(found, step), wanted, exact=self.exact):
                return False
        return True

    def _key(self, operation: Operation, tensors: Sequence[Any]) -> object:
        """Everything that a way's bits and speed can depend on; ``None`` where that is too much."""
        if operation.node.op != "call_function" or self.candidates is not ways_of:
            return None
        names = {n: f"{operation.roles[n].name}{i}" for i, n in enumerate(operation.node.all_input_nodes)}
        args: Any = fx.map_arg((operation.node.args, operation.node.kwargs), lambda n: names[n])
        literals = tuple((names[n], v) for n, v in operation.literals.items())
        layouts = tuple(spec_of_value(t) for t in tensors)
        single = tuple(spec_of(n) for n in operation.inputs)
        context = (operation.steps, self.exact, torch.get_num_threads())
        return repr((str(operation.node.target), args, literals, layouts, single, context))


_CACHE: dict[object, Choice] = {}


def _parts(spec: Spec) -> tuple[Spec, ...]:
    return (spec,) if isinstance(spec, TensorSpec) or spec is None else spec


def _at(value: Any, step: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[step]
    return None if value is None else tuple(_at(v, step) for v in value)


class _Stamper(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            stamp(n, spec_of_value(value), site_of(n))
        return value


def _stamp_all(module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    _Stamper(module, garbage_collect_values=True).run(*inputs)


def _bind(loop: Loop, operands: list[list[Any]], target: _Target) -> dict[fx.Node, _Value]:
    """Return the values of the body's placeholders over all steps, on each replica, and emit them."""
    graph, steps = target.graph, loop.trip_count
    emitted = [stamp(graph.placeholder(f"operand_{i}"), spec_of_value(v)) for i, v in enumerate(operands[0])]
    aligned = [loop.align(values) for values in operands]
    placeholders = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
    values: dict[fx.Node, _Value] = {}
    for node, binding in zip(placeholders, loop.bindings, strict=True):
        match binding:
            case Invariant(operand):
                whole = [o[operand] for o in operands]
                values[node] = _Value(Role.UNIFORM, whole, lambda r, _t, b=binding: operands[r][b.operand], emitted[operand])  # type: ignore[misc]
            case Literal(literals):
                values[node] = _Value(Role.LITERAL, [], lambda _r, t, b=binding: b.values[t], tuple(literals))  # type: ignore[misc]
            case Table(table):
                whole = [torch.stack([o[i] for i in table]) for o in operands]
                stacked = graph.call_function(torch.ops.aten.stack.default, ([emitted[i] for i in table],))
                stamp(stacked, spec_of_value(whole[0]))
                values[node] = _Value(Role.BATCHED, whole, lambda r, t, b=binding: operands[r][b.operands[t]], stacked)  # type: ignore[misc]
            case Scanned():
                way = _scanning(binding, operands[0][binding.operand], steps)
                whole = [way(o[binding.operand]) for o in operands]
                _stamp_all(way, [operands[0][binding.operand]])
                value = target.inline(way, [emitted[binding.operand]], node)
                values[node] = _Value(
                    Role.BATCHED, whole, lambda r, t, b=binding: aligned[r][b.operand].select(b.dim, b.indices[t]), value  # type: ignore[misc]
                )
            case Carried():
                raise _Unmeasurable("the loop carries values from step to step")
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
        from fxjacobi.batched import select_each

        value = graph.call_function(select_each, (value, binding.dim, tuple(indices)))
    graph.output(value)
    return fx.GraphModule({}, graph)


def _results(loop: Loop, outputs: Sequence[_Value], batcher: _Batcher, target: _Target) -> list[Any]:
    """Emit the loop's results; single steps keep the layout that they have in the loop."""
    graph, aten = target.graph, torch.ops.aten
    nodes = body_outputs(loop.body)
    results = []
    for result in loop.results:
        value = outputs[result.output]
        emitted = batcher._emit_at_all_steps(value, graph)
        whole = batcher._at_all_steps(value, 0)
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
    batcher = _Batcher(steps, replicas, sampled, exact=exact, candidates=candidates)
    target = _Target()
    with torch.no_grad():
        try:
            data = [sample_operands(loop, operands, seed) for seed in range(replicas)]
            outputs = _Frame(batcher, loop.body, _bind(loop, data, target), target).run()
            module = target.module(_results(loop, outputs, batcher, target))
        except _Unmeasurable as obstacle:
            return Batching(None, tuple(batcher.choices), math.inf, math.inf, str(obstacle))
        return _judged(loop, module, data, batcher)


def _judged(loop: Loop, module: fx.GraphModule, data: list[list[Any]], batcher: _Batcher) -> Batching:
    """Compare the assembled graph with the loop, in values and in time."""
    choices = tuple(batcher.choices)
    unguarded = _without_guards(module)
    plain = Loop(_without_guards(loop.body), loop.trip_count, loop.bindings, loop.results)
    for operands in data[: 1 if loop.trip_count > _SAMPLED_STEPS else None]:
        if not same_values(tuple(unguarded(*operands)), plain(*operands), exact=batcher.exact):
            return Batching(None, choices, math.inf, math.inf, "the operations together differ from the steps")
    batched_s = _seconds(lambda: unguarded(*data[0]))
    sequential_s = _seconds(lambda: plain(*data[0]))
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
