"""A loop's steps in the ordinary order on a device, many of them in one captured graph.

    for b in range(ceil(T / K)):  rows of the block's inputs -> static buffers;  replay K steps;  their outputs -> results

The kernels are those of the steps run one by one, in their order, on operands laid out and aligned alike, so the bits are
too; what is saved is the launching of each by itself. State stays in static buffers from one graph to the next.
Where the steps hold Python values of their own, all of them are one graph if that is not too large.
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from typing_extensions import override

from fxjacobi import ops
from fxjacobi.certificate import Certificate, Solution
from fxjacobi.device.block_input import BlockInput, pace, places
from fxjacobi.device.flags import read
from fxjacobi.device.form import DeviceForm, Explained, Forms, Session
from fxjacobi.device.hazards import draws, may_assert
from fxjacobi.device.operands import ALIGNMENT, copied
from fxjacobi.device.runner import Captured, Refused, runner_for
from fxjacobi.device.state import CarriedState
from fxjacobi.emit import rebuilt, tensors_of
from fxjacobi.loops import Literal, Loop, Scanned, Stacked, Step, Table

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from fxjacobi.device.operands import StaticOperands
    from fxjacobi.device.runner import GraphRunner

__all__ = ["StepGraphs", "device_of", "step_graphs"]

_OPERATIONS = 8192
"""Operations of one graph of a block of steps."""

_WHOLE = 32768
"""Operations of one graph of all steps, where blocks of steps are no equals of one another."""


class StepGraphs(Explained):
    """``s_t = h_t(s_{t-d})`` for ``t = 0 .. T-1`` in order (Gauss-Seidel), its steps captured; see the module's docstring.

    Args:
        loop: The loop, whose place it takes.
        operations: How many operations a graph may hold.
    """

    method = "step graphs"

    def __init__(self, loop: Loop, operations: int = _OPERATIONS) -> None:
        super().__init__()
        self.loop = loop
        self.reason = loop.reason
        self.last: Solution | None = None
        self._forms = Forms(lambda runner, device: StepForm(loop, runner, device, operations))

    @property
    def in_order(self) -> Loop:
        """The loop, for a loop around this one that is scripted as a whole."""
        return self.loop

    def forward(self, *operands: Any) -> tuple[Any, ...]:
        """Run the steps and return the loop's results."""
        steps = self.loop.trip_count
        self.last = Solution(steps, Certificate.SEQUENTIAL, completed=steps)
        recorded = torch.is_grad_enabled() and any(isinstance(o, torch.Tensor) and o.requires_grad for o in operands)
        form = None if recorded else self._forms.of(operands)
        found = None if form is None else form(operands)
        if found is not None:
            return found[0]
        results = self._uncaptured(operands)
        if form is not None:
            form.adopt(self.loop.align(operands), results)
        return results

    def _uncaptured(self, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        from fxjacobi.scripted_loop import scripted  # which runs loops by this module where it can

        return scripted(self.loop, operands)

    def extra_repr(self) -> str:
        """Show the trip count."""
        return f"trip_count={self.loop.trip_count}"


_known: weakref.WeakKeyDictionary[Loop, StepGraphs] = weakref.WeakKeyDictionary()


def step_graphs(loop: Loop) -> StepGraphs | None:
    """Return the loop's steps as captured graphs, the same ones for its lifetime; ``None`` where nothing captures."""
    if runner_for(device_of(loop)) is None:
        return None
    if loop not in _known:
        # Its own loop object: a value of the dictionary must not keep its key alive.
        same = Loop(loop.body, loop.trip_count, loop.bindings, loop.results, loop.reason)
        _known[loop] = StepGraphs(same)
    return _known[loop]


def device_of(loop: Loop) -> torch.device:
    """Return where the loop's body computes: on the first device beside the CPU that one of its nodes is on."""
    specs = [spec for node in loop.body.graph.nodes for spec in tensors_of(node.meta.get("spec"))]
    return next((spec.device for spec in specs if spec.device.type != "cpu"), torch.device("cpu"))


class StepForm(DeviceForm):
    """The captured steps of a loop."""

    def __init__(self, loop: Loop, runner: GraphRunner, device: torch.device, operations: int) -> None:
        super().__init__(runner, device)
        self.loop = loop
        self.operations = operations
        self.steps, self.whole = 0, False
        self.body, self.guards = _without_guards(loop.body)
        if draws(loop.body):
            self.refused = Refused("it draws random numbers step by step")
        elif self.guards is None:
            self.refused = Refused("a guard in its body is not of one number a step")
        elif self.guards and may_assert(loop.body):
            self.refused = Refused("a guard in its body keeps what follows from failing on the device")
        else:
            self.refused = self._plan()

    def _plan(self) -> Refused | None:
        """Choose how many steps a graph holds."""
        loop = self.loop
        size = max(1, sum(node.op.startswith("call") for node in self.body.graph.nodes))
        self.steps = max(1, min(loop.trip_count, self.operations // size))
        self.whole = self.steps == loop.trip_count or any(
            isinstance(b, Literal) and any(v != b.values[0] for v in b.values) for b in loop.bindings
        )
        if self.whole:
            self.steps = loop.trip_count
            if loop.trip_count * size > max(_WHOLE, self.operations):
                return Refused(
                    f"its {loop.trip_count} steps hold Python values of their own, and are too many for one graph"
                )
        return None

    @override
    def describe(self) -> str:
        return "all steps are one captured graph" if self.whole else f"{self.steps} steps are one captured graph"

    @override
    def streamed(self) -> Collection[int]:
        if self.whole:
            return ()
        found: set[int] = set()
        for binding in self.loop.bindings:
            if isinstance(binding, Scanned):
                found.add(binding.operand)
            elif isinstance(binding, Table):
                found.update(binding.operands)
        others = {o for b in self.loop.bindings for o in _read_otherwise(b)}
        return found - others

    @override
    def __call__(self, operands: Sequence[Any]) -> tuple[tuple[Any, ...], Solution] | None:
        return None if self.refused is not None else super().__call__(self.loop.align(operands))

    @override
    def build(self, operands: StaticOperands) -> Session | Refused:
        loop = Loop(self.body, self.loop.trip_count, self.loop.bindings, self.loop.results)
        state = CarriedState.of(loop, operands)
        if isinstance(state, Refused):
            return state
        session = _StepSession(self, loop, operands, state)
        return session.capture() or session


def _read_otherwise(binding: Any) -> Sequence[int]:
    """Return the operands that a binding reads as a whole."""
    match binding:
        case Scanned() | Table() | Literal():
            return ()
        case _:
            return binding.init if hasattr(binding, "init") else (binding.operand,)


class _StepSession(Session):
    def __init__(self, form: StepForm, loop: Loop, operands: StaticOperands, state: CarriedState) -> None:
        super().__init__(operands)
        self.form, self.loop, self.state = form, loop, state
        self.total = loop.trip_count
        self.lead = state.lead
        results = loop.results
        guarded = range(len(_outputs(form.loop.body)), len(_outputs(loop.body)))
        self.stacked = sorted({r.output for r in results if isinstance(r, Stacked)} | set(guarded))
        self.picked = sorted({r.output for r in results if isinstance(r, Step)})
        self.wanted_steps = {r.step for r in results if isinstance(r, Step)}
        self.inputs: dict[int, BlockInput] = {}
        self.returned: list[int] = []
        self.block = min(form.steps, self.total - self.lead)

    def capture(self) -> Refused | None:
        """Capture a block of steps (or all of them), from where the leading steps left the state."""
        if not self.form.whole:
            unit = self._unit()
            self.block = max(self.block // unit * unit, unit)
            if self.lead + self.block > self.total:
                return Refused(f"its {self.total} steps are fewer than a block whose rows are aligned alike")
            for place, binding in enumerate(self.loop.bindings):
                if isinstance(binding, (Scanned, Table)):
                    made = BlockInput.of(binding, self.operands, self.lead, self.block)
                    if isinstance(made, Refused):
                        return made
                    self.inputs[place] = made
            self._load(self.lead)
        blocks = (self.total - self.lead) // self.block
        stop = self.lead + blocks * self.block
        self.returned = sorted({(s - self.lead) % self.block for s in self.wanted_steps if self.lead <= s < stop})
        self.state.start()
        captured = self.form.runner.capture(self._steps, self.form.device)
        if isinstance(captured, Refused):
            return captured
        self.captured: Captured = captured
        return None

    def _unit(self) -> int:
        """Return how many steps apart rows of the scanned operands are aligned alike."""
        unit = 1
        for binding in self.loop.bindings:
            if isinstance(binding, Scanned):
                operand = self.operands.values[binding.operand]
                apart = pace(places(binding, operand))
                stride = abs(operand.stride(binding.dim) * apart * operand.element_size()) or ALIGNMENT
                unit = math.lcm(unit, ALIGNMENT // math.gcd(ALIGNMENT, stride))
        return unit

    def _steps(self) -> Sequence[torch.Tensor]:
        """The program: a block of steps from the state in the buffers, which it leaves as it is after them."""
        values: Sequence[torch.Tensor] = self.state.buffers
        stacks: dict[int, list[torch.Tensor]] = {o: [] for o in self.stacked}
        picked: list[torch.Tensor] = []
        for inner in range(self.block):
            outputs = self.loop.body.forward(*self._arguments(values, inner))
            values = self.state.after(outputs, values)
            for output, stack in stacks.items():
                stack.append(outputs[output])
            if inner in self.returned:
                picked += [outputs[o] for o in self.picked]
        results = [torch.stack(stack) for stack in stacks.values()]
        picked = self.state.materialised(picked)
        self.state.write(values)
        return [*results, *picked]

    def _arguments(self, values: Sequence[torch.Tensor], inner: int) -> list[Any]:
        if self.form.whole:
            return self.state.arguments(values=values, step=self.lead + inner)
        bound = self.state.arguments(values=values, step=self.lead, skip=self.inputs)
        for place, made in self.inputs.items():
            bound[place] = made.row(inner)
        return bound

    def _load(self, start: int) -> None:
        for made in self.inputs.values():
            made.load(self.operands.values, start)

    @override
    def solve(self) -> tuple[tuple[Any, ...], Solution] | None:
        found = _Found(self.loop, self.total)
        leading: list[tuple[Any, ...]] = []
        step = self.state.start(leading)
        for at, outputs in enumerate(leading):
            found.add_step(at, outputs, self.stacked, self.picked)
        while step + self.block <= self.total:
            if not self.form.whole:
                self._load(step)
            self.captured.replay()
            found.add_block(step, self.block, self.captured.outputs, self)
            step += self.block
        values: Sequence[torch.Tensor] = self.state.buffers
        while step < self.total:
            outputs = self.loop.body.forward(*self.state.arguments(values=values, step=step))
            values = self.state.after(outputs, values)
            found.add_step(step, outputs, self.stacked, self.picked)
            step += 1
        found.check(self.form.guards or (), len(_outputs(self.form.loop.body)), self.form.loop)
        return found.results(), Solution(self.total, Certificate.SEQUENTIAL, completed=self.total)


class _Found:
    """The results of one call as they come in."""

    def __init__(self, loop: Loop, total: int) -> None:
        self._loop, self._total = loop, total
        self._stacks: dict[int, torch.Tensor] = {}
        self._single: dict[tuple[int, int], Any] = {}
        self._wanted = {(r.output, r.step) for r in loop.results if isinstance(r, Step)}

    def _stack(self, output: int, row: torch.Tensor) -> torch.Tensor:
        if output not in self._stacks:
            self._stacks[output] = torch.empty((self._total, *row.shape), dtype=row.dtype, device=row.device)
        return self._stacks[output]

    def add_step(self, step: int, outputs: Sequence[Any], stacked: Sequence[int], picked: Sequence[int]) -> None:
        for output in stacked:
            self._stack(output, outputs[output])[step].copy_(outputs[output])
        for output in picked:
            if (output, step) in self._wanted:
                value = outputs[output]
                self._single[output, step] = copied(value) if isinstance(value, torch.Tensor) else value

    def add_block(self, start: int, count: int, outputs: Sequence[torch.Tensor], session: _StepSession) -> None:
        whole = len(session.stacked)
        for output, rows in zip(session.stacked, outputs[:whole], strict=True):
            self._stack(output, rows[0])[start : start + count].copy_(rows)
        for place, inner in enumerate(session.returned):
            for column, output in enumerate(session.picked):
                if (output, start + inner) in self._wanted:
                    self._single[output, start + inner] = copied(outputs[whole + place * len(session.picked) + column])

    def check(self, guards: Sequence[fx.Node], first: int, loop: Loop) -> None:
        """Compare the guarded values of all steps with those of the recorded run, read at once."""
        placeholders = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
        values = read([self._stacks.pop(first + place) for place in range(len(guards))])
        for guard, value in zip(guards, values, strict=True):
            expected = guard.args[1]
            wanted: Any = (expected,) * self._total
            if isinstance(expected, fx.Node):
                binding = loop.bindings[placeholders.index(expected)]
                assert isinstance(binding, Literal)
                wanted = binding.values
            ops.guard_steps(value, wanted)

    def results(self) -> tuple[Any, ...]:
        return tuple(
            self._stacks[r.output] if isinstance(r, Stacked) else self._single[r.output, r.step]
            for r in self._loop.results
        )


def _outputs(body: fx.GraphModule) -> Sequence[Any]:
    values: Any = body.graph.output_node().args[0]
    return tuple(values)


def _without_guards(body: fx.GraphModule) -> tuple[fx.GraphModule, list[fx.Node] | None]:
    """Return ``body`` with the values that its guards look at as more outputs, and the guards; ``None`` if some cannot."""
    guards = [node for node in body.graph.nodes if node.target in ops.GUARDS]
    if not guards:
        return body, []
    if any(guard.target is not ops.guard or not isinstance(guard.args[0], fx.Node) for guard in guards):
        return body, None
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in body.graph.nodes:
        if node.op == "output":
            found: Any = fx.map_arg(node.args[0], lambda n: env[n])
            graph.output((*found, *(env[guard.args[0]] for guard in guards)))
        elif node not in guards:
            env[node] = graph.node_copy(node, env.__getitem__)
    return rebuilt(body, graph, {}), guards
