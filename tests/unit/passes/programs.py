"""Little programs with loops, recorded, and what the tests of the front passes ask of graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import fx

from fxjacobi.capture import capture
from fxjacobi.graph import check, make_module, spec_of_value, stamp
from fxjacobi.loops import Loop
from fxjacobi.ops import restride, write
from fxjacobi.passes.canonicalize import Canonicalize
from fxjacobi.passes.eliminate import Eliminate
from fxjacobi.passes.roll_loops import RollLoops
from fxjacobi.placement import phase_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Tensors = tuple[torch.Tensor, ...]


def record(fn: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """The graph of ``fn``'s run without gradients."""
    with torch.no_grad():
        module = capture(fn, args, {}).graph_module
    check(module, after="capture")
    return module


def build(fn: Callable[..., Any], *args: torch.Tensor) -> fx.GraphModule:
    """The graph of ``fn``, which calls ATen operations on proxies, as it stands; specs and phases come from a run."""
    module = fx.Tracer(autowrap_functions=(write, restride)).trace(fn)
    graph_module = fx.GraphModule({}, module)

    class Stamp(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            stamp(n, spec_of_value(result))
            if n.op == "placeholder":
                n.meta["phase"] = phase_of(result)
            return result

    for node in module.nodes:
        if node.op == "output" and not isinstance(node.args[0], tuple):
            node.args = ((node.args[0],),)
    Stamp(graph_module).run(*args)
    return make_module({}, module)


def roll(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` after rolling alone."""
    return RollLoops().run(module).module


def front(module: fx.GraphModule) -> fx.GraphModule:
    """``module`` after all front passes."""
    for each in (Canonicalize(), Eliminate(), RollLoops(), Eliminate()):
        module = each.run(module).module
    return module


def targets(module: fx.GraphModule) -> list[Any]:
    """The operations of a graph, in order."""
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def loops(module: fx.GraphModule) -> list[Loop]:
    """The loops that a graph calls, in order."""
    called = [module.get_submodule(str(node.target)) for node in module.graph.nodes if node.op == "call_module"]
    return [loop for loop in called if isinstance(loop, Loop)]


def shape(module: fx.GraphModule) -> list[Any]:
    """The trip counts of a graph's loops; of one that holds others, ``(trip count, those)``."""
    return [(loop.trip_count, shape(loop.body)) if loops(loop.body) else loop.trip_count for loop in loops(module)]


def assert_runs_as(module: fx.GraphModule, fn: Callable[..., Any], *args: torch.Tensor) -> None:
    """Fail unless ``module`` gives ``fn``'s results: values, types, shapes and strides."""
    check(module, after="the pass")
    with torch.no_grad():
        wanted = fn(*args)
        found = module(*args)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    assert len(found) == len(wanted)
    for number, (a, b) in enumerate(zip(found, wanted, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), number
        assert torch.equal(a, b) or torch.equal(a.isnan(), b.isnan()), f"output {number} differs"
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), f"output {number} differs"


@dataclass(frozen=True)
class Step:
    """One instruction of a loop body; it appends a register."""

    op: str
    a: int
    b: int
    k: int


@dataclass(frozen=True)
class Program:
    """``T`` iterations over a few states and an array, with the ways their values leave the loop."""

    trips: int
    states: int
    steps: tuple[Step, ...]
    finals: tuple[int, ...]
    outputs: tuple[str, ...]
    seed: int

    def arguments(self, shift: int = 0) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(self.seed + shift)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator)

        return draw(2, self.trips, 3), draw(self.states, 2, 3), draw(self.trips, 3, 3), draw(3, 3), draw(2, 3)

    def __call__(self, *args: torch.Tensor) -> Tensors:
        x, init, parameters, matrix, constant = args
        each = parameters.unbind(0)
        history: list[list[torch.Tensor]] = [[init[s]] for s in range(self.states)]
        array = torch.zeros(2, self.trips, 3)
        for t in range(self.trips):
            registers = [constant]
            for step in self.steps:
                registers.append(self.run(step, t, registers, history, array, x, each, matrix))
            for state, final in enumerate(self.finals):
                history[state].append(registers[final % len(registers)])
        results: list[torch.Tensor] = [array]
        for state, how in enumerate(self.outputs):
            results += self.leave(how, history[state][1:])
        return tuple(results)

    def run(
        self,
        step: Step,
        t: int,
        registers: Sequence[torch.Tensor],
        history: Sequence[Sequence[torch.Tensor]],
        array: torch.Tensor,
        x: torch.Tensor,
        each: Sequence[torch.Tensor],
        matrix: torch.Tensor,
    ) -> torch.Tensor:
        a, b = registers[step.a % len(registers)], registers[step.b % len(registers)]
        trips = self.trips
        match step.op:
            case "state":
                past = history[step.a % self.states]
                return past[max(0, len(past) - 1 - step.k)]
            case "input":
                return x[:, (t, trips - 1 - t, t * t % trips, 0)[step.k % 4]]
            case "parameter":
                return a @ each[t]
            case "matmul":
                return a @ matrix
            case "literal":
                return a * float(t + step.k)
            case "add":
                return a + b
            case "tanh":
                return torch.tanh(a)
            case "read":
                return array[:, t - 1 - step.k] if t > step.k else a
            case "attend":
                return (array * 0.5).sum(1) + a
            case "write":
                array[:, t] = a
                return a
            case "odd":
                return torch.sin(a) if t == step.k else a
            case "chunks":
                return torch.cat(a.split([1, 2], 1)[::-1], 1)
            case "inner":
                for j in range(3 + step.k % 2):
                    a = torch.tanh(a + x[:, j % trips])
                return a
        raise AssertionError(step.op)

    @staticmethod
    def leave(how: str, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        match how:
            case "stack":
                return [torch.stack(tuple(values), 1)]
            case "first":
                return [torch.stack(tuple(values))]
            case "cat":
                return [torch.cat(tuple(values), -1)]
            case "reverse":
                return [torch.cat(tuple(values)[::-1], 0)]
            case "part":
                return [torch.stack((values[0] * 2, *values), 2), torch.cat(tuple(values[1:]), 0)]
            case "all":
                return [value + 1 for value in values]
        return [values[-1] * 1]


OPS = (
    "state", "state", "input", "parameter", "matmul", "literal", "add", "add", "tanh", "read", "attend", "write",
    "odd", "chunks", "inner",
)  # fmt: skip


@st.composite
def programs(draw: st.DrawFn) -> Program:
    states = draw(st.integers(1, 3))
    small = st.integers(0, 30)
    steps = draw(
        st.lists(st.builds(Step, st.sampled_from(OPS), small, small, st.integers(0, 3)), min_size=2, max_size=9)
    )
    return Program(
        trips=draw(st.integers(2, 8)),
        states=states,
        steps=(Step("state", 0, 0, 0), *steps),
        finals=tuple(draw(st.lists(small, min_size=states, max_size=states))),
        outputs=tuple(
            draw(
                st.lists(
                    st.sampled_from(["stack", "first", "cat", "reverse", "part", "all", "last"]),
                    min_size=states,
                    max_size=states,
                )
            )
        ),
        seed=draw(st.integers(0, 1000)),
    )
