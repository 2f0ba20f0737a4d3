"""Running the ways of a map's operations on random data, one operation after another, as the batched graph grows."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

from fxjacobi import ops
from fxjacobi.batched import BatchedMap
from fxjacobi.emit import rebuilt
from fxjacobi.equations import body_outputs
from fxjacobi.fixed_point import FixedPoint
from fxjacobi.graph import Spec, TensorSpec, site_of, spec_of, spec_of_value, stamp, stamp_all
from fxjacobi.loops import Loop
from fxjacobi.operation import Operation, Role, Way
from fxjacobi.placement import rounding_phase
from fxjacobi.trial import MISFITS, Choice, Trial, Unmeasurable, same_values, seconds_of
from fxjacobi.ways import ways_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

__all__ = [
    "MISFITS",
    "Batcher",
    "Choice",
    "Frame",
    "Target",
    "Trial",
    "Unmeasurable",
    "Value",
    "same_values",
    "seconds_of",
]

Candidates: TypeAlias = "Callable[[Operation], Iterator[tuple[Way, fx.GraphModule]]]"


@dataclass
class Value:
    """One value of the body: its role, its batched values on each replica of the data, and its single steps.

    ``steps(replica, step)`` runs the body as the loop does; it is asked for what a measurement needs and no more.
    """

    role: Role
    batched: list[Any]
    steps: Callable[[int, int], Any]
    emitted: Any


class Frame:
    """One body on its way into a batched graph: the values of its nodes."""

    def __init__(self, batcher: Batcher, body: fx.GraphModule, values: dict[fx.Node, Value], target: Target) -> None:
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

    def step_seconds(self, node: fx.Node, step: int) -> float:
        """Return how long ``node`` takes at one step."""
        self.step_value(node, 0, step)
        return seconds_of(lambda: self._run_step(node, 0, step))

    def _run_step(self, node: fx.Node, replica: int, step: int) -> Any:
        args: Any = fx.map_arg(node.args, lambda n: self.memory[n, replica, step])
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: self.memory[n, replica, step])
        function: Any = self.body.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        try:
            return function(*args, **kwargs)
        except MISFITS as misfit:
            raise Unmeasurable(f"{node.name} does not run on random data: {misfit}") from misfit

    def run(self) -> tuple[Value, ...]:
        """Batch every node and return the outputs."""
        for node in self.body.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self.values[node] = self.batcher.batch(self, node)
        return tuple(self.values[node] for node in body_outputs(self.body))


class Target:
    """The graph that grows: all equations together."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.modules: dict[str, nn.Module] = {}

    def add_module(self, stem: str, module: nn.Module) -> str:
        """Register ``module`` and return its name."""
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
                target = self.add_module(like.name, way.get_submodule(str(target)))
            env[node] = self.graph.create_node(node.op, target, args, kwargs)
            stamp(env[node], node.meta.get("spec"), site_of(like))
        raise AssertionError(way.code)

    def module(self, outputs: Sequence[Any]) -> fx.GraphModule:
        """Finish the graph and return it, without what nobody reads."""
        self.graph.output(tuple(outputs))
        self.graph.eliminate_dead_code(lambda n: n.op == "output" or n.target in ops.GUARDS or n.op == "placeholder")
        return rebuilt(fx.GraphModule({}, fx.Graph()), self.graph, self.modules)


class Batcher:
    """The measuring of one map.

    Args:
        steps: The number of equations T.
        replicas: How many sets of random data there are.
        sampled: The steps that are run by themselves, to compare with.
        choices: Where each choice is put.
        exact: Whether bits must agree.
        candidates: The ways to try.
    """

    def __init__(
        self,
        steps: int,
        replicas: int,
        sampled: Sequence[int],
        choices: list[Choice],
        *,
        exact: bool,
        candidates: Candidates,
    ) -> None:
        self.steps, self.replicas, self.sampled = steps, replicas, tuple(sampled)
        self.exact, self.candidates, self.choices = exact, candidates, choices

    def batch(self, frame: Frame, node: fx.Node) -> Value:
        """Return the value of ``node`` at all steps, appending to the frame's graph what computes it."""
        values = frame.values
        inputs = [values[n] for n in node.all_input_nodes]
        if node.target in ops.GUARDS:
            return self._guard(frame, node)
        if node.target is operator.getitem and inputs[0].role is not Role.LITERAL:
            whole, index = inputs[0], node.args[1]
            assert isinstance(index, int)
            emitted = whole.emitted[index] if isinstance(whole.emitted, tuple) else None
            if emitted is None:
                emitted = frame.target.graph.call_function(operator.getitem, (whole.emitted, index))
                stamp(emitted, spec_of_value(whole.batched[0][index]), site_of(node))
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

    def _value(self, frame: Frame, node: fx.Node, role: Role, batched: list[Any], emitted: Any) -> Value:
        return Value(role, batched, lambda replica, step: frame.step_value(node, replica, step), emitted)

    def _guard(self, frame: Frame, node: fx.Node) -> Value:
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
            raise Unmeasurable(f"{node.name} guards more than one number a step")
        return Value(Role.UNIFORM, [None] * self.replicas, lambda _replica, _step: None, None)

    def _uniform(self, frame: Frame, node: fx.Node) -> Value:
        values, target = frame.values, node.target
        if node.op == "call_module":
            target = frame.target.add_module(node.name, frame.body.get_submodule(str(target)))
        args: Any = fx.map_arg(node.args, lambda n: values[n].emitted)
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: values[n].emitted)
        emitted = stamp(frame.target.graph.create_node(node.op, target, args, kwargs), spec_of(node), site_of(node))
        batched = [frame.step_value(node, replica, self.sampled[0]) for replica in range(self.replicas)]
        return self._value(frame, node, Role.UNIFORM, batched, emitted)

    def _inlined(self, frame: Frame, node: fx.Node, module: fx.GraphModule) -> Value:
        """A submodule recorded once is batched like the body that calls it."""
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        arguments: tuple[Any, ...] = node.args
        values = dict(zip(placeholders, (frame.values[n] for n in arguments), strict=True))
        outputs = Frame(self, module, values, frame.target).run()
        batched = [tuple(self.at_all_steps(o, replica) for o in outputs) for replica in range(self.replicas)]
        emitted = tuple(self.emit_at_all_steps(o, frame.target.graph) for o in outputs)
        return self._value(frame, node, Role.BATCHED, batched, emitted)

    def at_all_steps(self, value: Value, replica: int) -> Any:
        """Return a value's data with a leading T, whatever its role."""
        tensor = value.batched[replica]
        return tensor if value.role is Role.BATCHED else tensor.expand(self.steps, *tensor.shape)

    def emit_at_all_steps(self, value: Value, graph: fx.Graph) -> Any:
        """Return a value's node with a leading T, whatever its role."""
        if value.role is Role.BATCHED:
            return value.emitted
        shape = [self.steps, *value.batched[0].shape]
        return stamp(
            graph.call_function(torch.ops.aten.expand.default, (value.emitted, shape)),
            spec_of_value(self.at_all_steps(value, 0)),
        )

    def _measured(self, frame: Frame, node: fx.Node) -> Value:
        """Run every way of one operation on what the ways before left, and keep the fastest lawful one."""
        values = frame.values
        if not any(isinstance(part, TensorSpec) for part in _parts(spec_of(node))):
            raise Unmeasurable(f"{node.name} is a Python value")
        roles = {n: values[n].role for n in node.all_input_nodes}
        literals = {n: values[n].emitted for n, role in roles.items() if role is Role.LITERAL}
        operation = Operation(node, self.steps, roles, literals, frame.body)
        inputs = [[values[n].batched[replica] for n in operation.inputs] for replica in range(self.replicas)]
        key = self._key(operation, inputs[0])
        known = _CACHE.get(key) if key is not None else None
        # How long the steps take one after another, without running them all.
        one_by_one_s = self.steps * frame.step_seconds(node, self.sampled[0]) if known is None else math.inf
        made = len(self.choices)
        trials: list[Trial] = []
        best: tuple[Trial, fx.GraphModule, list[Any]] | None = None
        for way, module in self._candidates(frame, operation):
            if known is not None and way is not known.way:
                continue
            if way is Way.ONE_BY_ONE and best is not None and best[0].seconds < one_by_one_s:
                trials.append(Trial(way, one_by_one_s, True, "estimated"))
                continue
            trial, outputs = self._try(frame, operation, way, module, inputs, believe=known is not None)
            trials.append(trial)
            # Of ways about as fast, the one named first: the more plain.
            if trial.equal and (best is None or trial.seconds < 0.9 * best[0].seconds):
                best = trial, module, outputs
        if best is None:
            raise Unmeasurable(f"no way of running {node.name} keeps its bits, not even step by step")
        choice = Choice(node.name, str(node.target), best[0].way, known.trials if known is not None else tuple(trials))
        if key is not None and known is None:
            _CACHE[key] = choice
        if choice.way is not Way.INTERCHANGED:
            del self.choices[made:]
        self.choices.append(choice)
        _, module, outputs = best
        stamp_all(module, inputs[0])
        emitted = frame.target.inline(module, [values[n].emitted for n in operation.inputs], node)
        return self._value(frame, node, Role.BATCHED, outputs, emitted)

    def _candidates(self, frame: Frame, operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
        if operation.node.op == "call_module":
            module = frame.body.get_submodule(str(operation.node.target))
            if isinstance(module, (Loop, FixedPoint)):
                from fxjacobi.interchange import interchanged

                found = interchanged(self, frame, operation, module)
                if found is not None:
                    yield Way.INTERCHANGED, found
        yield from self.candidates(operation)

    def _try(
        self,
        frame: Frame,
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
            except MISFITS as misfit:
                return Trial(way, math.inf, False, str(misfit).splitlines()[0] if str(misfit) else repr(misfit)), []
            if not believe and not self._agrees(frame, operation.node, found, replica):
                return Trial(way, math.inf, False, "other bits" if self.exact else "other values"), []
            outputs.append(found)
        return Trial(way, seconds_of(lambda: module(*inputs[0])), True), outputs

    def _agrees(self, frame: Frame, node: fx.Node, found: Any, replica: int) -> bool:
        singles = [_flat(frame.step_value(node, replica, step)) for step in self.sampled]
        every = len(self.sampled) == self.steps
        for i, whole in enumerate(_flat(found)):
            column = [single[i] for single in singles]
            if isinstance(whole, torch.Tensor):
                if any(c.shape != column[0].shape or c.dtype != column[0].dtype for c in column):
                    raise Unmeasurable(f"{node.name} has another shape on other data")
                sampled = whole if every else whole[list(self.sampled)]
                if not same_values(sampled, torch.stack(column), exact=self.exact):
                    return False
        return True

    def _key(self, operation: Operation, tensors: Sequence[Any]) -> object:
        """Everything that a way's bits and speed can depend on; ``None`` where that is too much."""
        if operation.node.op != "call_function" or self.candidates is not ways_of:
            return None
        names = {n: f"{operation.roles[n].name}{i}" for i, n in enumerate(operation.node.all_input_nodes)}
        args: Any = fx.map_arg((operation.node.args, operation.node.kwargs), lambda n: names[n])
        literals = tuple((names[n], v) for n, v in operation.literals.items())
        layouts = tuple((spec_of_value(t), rounding_phase(t) if isinstance(t, torch.Tensor) else 0) for t in tensors)
        single = tuple(spec_of(n) for n in operation.inputs)
        context = (operation.steps, self.exact, torch.get_num_threads())
        return repr((str(operation.node.target), args, literals, layouts, single, context))


_CACHE: dict[object, Choice] = {}


def _parts(spec: Spec) -> tuple[Spec, ...]:
    return (spec,) if isinstance(spec, TensorSpec) or spec is None else spec


def _flat(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
