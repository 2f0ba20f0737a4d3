"""Loops built by hand for tests: a Python function of one step, bindings and results."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import fx

from fxjacobi import ops
from fxjacobi.graph import spec_of_value, stamp, stamp_all
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Result, Scanned, Stacked, Step, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Program", "block_loops", "graph_of", "make_loop", "node", "programs", "same_bits", "trace"]

aten = torch.ops.aten


def trace(function: Callable[..., tuple[Any, ...]]) -> fx.GraphModule:
    """Return ``function`` as a graph; it calls ATen overloads, and other functions through :func:`node`."""
    return fx.GraphModule({}, fx.Tracer().trace(function))


def node(function: Callable[..., Any], *args: Any) -> Any:
    """Inside a traced function: append a call of ``function`` to the graph."""
    proxy = next(a for a in args if isinstance(a, fx.Proxy))
    return proxy.tracer.create_proxy("call_function", function, args, {})


def make_loop(
    body: Callable[..., tuple[Any, ...]] | fx.GraphModule,
    trip_count: int,
    bindings: Sequence[Any],
    results: Sequence[Result],
    operands: Sequence[torch.Tensor],
) -> Loop:
    """Return a loop whose body is traced and carries the specs of its last step."""
    graph_module = body if isinstance(body, fx.GraphModule) else trace(body)
    loop = Loop(graph_module, trip_count, bindings, results)
    outputs: list[Sequence[Any]] = []
    for step in range(trip_count):
        outputs.append(stamp_all(graph_module, loop.bind(operands, step, outputs)))
    return loop


def graph_of(loop: Loop, operands: Sequence[torch.Tensor]) -> fx.GraphModule:
    """Return a graph that takes ``operands``, calls ``loop`` and returns all of its results."""
    graph = fx.Graph()
    inputs = [stamp(graph.placeholder(f"operand_{i}"), spec_of_value(o)) for i, o in enumerate(operands)]
    specs = spec_of_value(loop(*operands))
    assert isinstance(specs, tuple)
    node = stamp(graph.call_module("loop_0", tuple(inputs)), specs)
    graph.output(tuple(stamp(graph.call_function(operator.getitem, (node, i)), spec) for i, spec in enumerate(specs)))
    return fx.GraphModule({"loop_0": loop}, graph)


def same_bits(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether two results have the same shapes, dtypes and bits (any NaN is any other)."""
    if len(found) != len(wanted):
        return False
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) or not torch.equal(a.isnan(), b.isnan()):
            return False
        if a.is_floating_point() and not torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan()):
            return False
    return True


def block_loops(module: fx.GraphModule) -> list[Loop]:
    """Return the loops that ``module``'s graph calls, in order."""
    called = [module.get_submodule(str(n.target)) for n in module.graph.nodes if n.op == "call_module"]
    return [m for m in called if isinstance(m, Loop)]


@dataclass(frozen=True)
class Program:
    """A loop with operands for it."""

    loop: Loop
    operands: tuple[torch.Tensor, ...]

    def __repr__(self) -> str:
        specs = [str(spec_of_value(o)) for o in self.operands]
        return f"Program({self.loop.extra_repr()}, operands={specs}\n{self.loop.body.graph.python_code('self').src})"


_B, _H = 2, 4
_UNARY = (aten.tanh.default, aten.sigmoid.default, aten.neg.default, aten.cos.default)
_BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.maximum.default)


def _operation(draw: st.DrawFn, graph: fx.Graph, values: list[fx.Node], named: dict[str, fx.Node]) -> fx.Node:
    """Append one operation on values of shape (B, H)."""

    def value() -> fx.Node:
        return draw(st.sampled_from(values))

    def append(target: Any, *args: Any) -> fx.Node:
        return graph.call_function(target, args)

    match draw(st.integers(0, 9)):
        case 0 | 1:
            return append(draw(st.sampled_from(_UNARY)), value())
        case 2 | 3 | 4:
            return append(draw(st.sampled_from(_BINARY)), value(), value())
        case 5:
            return append(aten.addmm.default, named["bias"], value(), named["weight"])
        case 6:
            parts = append(aten.split.Tensor, value(), _H // 2, 1)
            first, second = append(operator.getitem, parts, 0), append(operator.getitem, parts, 1)
            return append(aten.cat.default, [second, first], 1)
        case 7:
            return append(aten.add.Tensor, value(), append(aten.select.int, named["rows"], 0, named["number"]))
        case 8:
            norm = append(aten.native_layer_norm.default, value(), [_H], None, None, 1e-5)
            return append(operator.getitem, norm, 0)
        case _:
            turned = append(aten.t.default, append(aten.clone.default, append(aten.t.default, value())))
            return append(aten.mul.Tensor, turned, named["layer"])


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random loops of a few carries, scans, literals, tables, invariants and guards over values of shape (2, 4)."""
    trip_count = draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    graph, bindings, operands = fx.Graph(), list[Binding](), list[torch.Tensor]()
    values: list[fx.Node] = []
    named: dict[str, fx.Node] = {}

    def bind(name: str, binding: Binding) -> fx.Node:
        bindings.append(binding)
        named[name] = graph.placeholder(name)
        return named[name]

    def operand(value: torch.Tensor) -> int:
        operands.append(value)
        return len(operands) - 1

    bind("weight", Invariant(operand(tensor(_H, _H))))
    bind("bias", Invariant(operand(tensor(_H))))
    bind("rows", Invariant(operand(tensor(trip_count + 3, _H))))
    numbers = draw(st.lists(st.integers(0, trip_count + 2), min_size=trip_count, max_size=trip_count))
    bind("number", Literal(tuple(numbers)))
    bind("layer", Table(tuple(operand(tensor(_H)) for _ in range(trip_count))))
    values.append(bind("whole", Invariant(operand(tensor(_B, _H)))))
    dim = draw(st.integers(0, 2))
    shape = [_B, _H]
    shape.insert(dim, trip_count)
    values.append(bind("scan", Scanned(operand(tensor(*shape)), dim, range(trip_count))))
    distances = draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    carried: list[int] = []
    for i, distance in enumerate(distances):
        turned = draw(st.booleans())
        init = tuple(
            operand(tensor(_H, _B).t() if turned and draw(st.booleans()) else tensor(_B, _H)) for _ in range(distance)
        )
        carried.append(len(bindings))
        values.append(bind(f"carry_{i}", Carried(-1, distance, init)))
    for _ in range(draw(st.integers(1, 9))):
        values.append(_operation(draw, graph, values, named))
    if draw(st.booleans()):
        wrong = graph.call_function(aten.isnan.default, (draw(st.sampled_from(values)),))
        graph.call_function(ops.guard, (graph.call_function(aten.any.default, (wrong,)), False))
    outputs: list[fx.Node] = []
    for slot in carried:
        binding = bindings[slot]
        assert isinstance(binding, Carried)
        bindings[slot] = Carried(len(outputs), binding.distance, binding.init)
        outputs.append(draw(st.sampled_from(values)))
    outputs += draw(st.lists(st.sampled_from(values), max_size=3))
    graph.output(tuple(outputs))
    output = st.integers(0, len(outputs) - 1)
    step = st.integers(0, trip_count - 1) | st.just(trip_count - 1)
    results = draw(st.lists(st.builds(Step, output, step) | st.builds(Stacked, output), min_size=1, max_size=4))
    return Program(make_loop(fx.GraphModule({}, graph), trip_count, bindings, results, operands), tuple(operands))
