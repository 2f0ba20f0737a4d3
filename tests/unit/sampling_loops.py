"""Sampling loops for tests, recorded from ordinary Python as the compiler records them, and by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxjacobi import ops
from fxjacobi.capture import capture
from fxjacobi.causal_rules.interpreter import operand_value
from fxjacobi.graph import spec_of_value, stamp
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Result, Scanned, Step
from fxjacobi.passes.canonicalize import Canonicalize
from fxjacobi.passes.collapse_writes import CollapseWrites
from fxjacobi.passes.eliminate import Eliminate
from fxjacobi.passes.hoist_random import HoistRandom
from fxjacobi.passes.roll_loops import RollLoops
from fxjacobi.passes.split_components import SplitComponents

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Sampling", "call", "recorded", "rolled", "sampling_loop", "write"]

aten = torch.ops.aten


def rolled(function: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """Record ``function(*args)`` and roll its loops, as the compiler does before it looks for sampling loops."""
    module = capture(function, args, {}).graph_module
    passes = (
        Canonicalize(gradients=False),
        HoistRandom(),
        Eliminate(),
        RollLoops(),
        SplitComponents(),
        CollapseWrites(),
    )
    for each in passes:
        module = each.run(module).module
    return module


@dataclass
class Sampling:
    """A loop built by hand, its operands, and what is known of them."""

    loop: Loop
    operands: list[torch.Tensor]
    known: list[Any]

    def ordinary(self) -> tuple[Any, ...]:
        """Run the loop in order."""
        with torch.no_grad():
            results: tuple[Any, ...] = self.loop(*self.operands)
            return results


class _Stamp(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            stamp(n, spec_of_value(value))
        return value


def _trace(function: Callable[..., Any], examples: Sequence[Any]) -> fx.GraphModule:
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    outputs = function(*(fx.Proxy(graph.placeholder(f"a{i}"), tracer) for i in range(len(examples))))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    graph.output(tuple(output.node for output in outputs))
    traced = fx.GraphModule(nn.Module(), graph)
    with torch.no_grad():
        _Stamp(traced).run(*examples)
    return traced


def call(target: Any, *args: Any) -> Any:
    """Append a call of ``target`` to the graph that the proxies among ``args`` belong to."""
    proxy = next(a for a in args if isinstance(a, fx.Proxy))
    return proxy.tracer.create_proxy("call_function", target, args, {})


def write(base: Any, value: Any, index: tuple[Any, ...]) -> Any:
    """Append a write."""
    return call(ops.write, base, value, index)


def recorded(module: nn.Module, example: torch.Tensor) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    """Return a function that replays ``module`` on proxies of ``(input, *tensors)``, and its tensors."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())

    def run(x: torch.Tensor, *tensors: torch.Tensor) -> Any:
        return torch.func.functional_call(module, dict(zip(named, tensors, strict=True)), (x,))

    tensors = [tensor.detach() for tensor in named.values()]
    with torch.no_grad():
        graph = make_fx(run)(example, *tensors).graph

    def replay(*proxies: Any) -> Any:
        values: dict[fx.Node, Any] = dict(zip((n for n in graph.nodes if n.op == "placeholder"), proxies, strict=True))
        for node in graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg(node.args, values.__getitem__), fx.map_arg(node.kwargs, values.__getitem__)
                values[node] = proxies[0].tracer.create_proxy("call_function", node.target, args, kwargs)
        return fx.map_arg(graph.output_node().args[0], values.__getitem__)

    return replay, tensors


def sampling_loop(
    body: Callable[..., Any],
    start: torch.Tensor,
    literals: Sequence[Sequence[int]],
    noise: torch.Tensor | None = None,
    tensors: Sequence[torch.Tensor] = (),
    *,
    results: Sequence[Result] | None = None,
) -> Sampling:
    """Build the loop of ``body(x, *literals, noise_t, *tensors)``, whose first output is the next ``x``."""
    steps = len(literals[0])
    scanned = [] if noise is None else [noise]
    examples = [start, *(values[-1] for values in literals), *(one[-1] for one in scanned), *tensors]
    bindings: list[Binding] = [Carried(0, 1, (0,)), *(Literal(tuple(values)) for values in literals)]
    bindings += [Scanned(1, 0, range(steps)) for _ in scanned]
    first = 1 + len(scanned)
    bindings += [Invariant(first + number) for number in range(len(tensors))]
    loop = Loop(_trace(body, examples), steps, bindings, results or [Step(0, steps - 1)])
    known = [operand_value(start, None), *(operand_value(one, None) for one in scanned)]
    known += [operand_value(tensor, f"tensor_{number}") for number, tensor in enumerate(tensors)]
    return Sampling(loop, [start, *scanned, *tensors], known)
