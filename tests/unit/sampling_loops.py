"""Sampling loops for tests: networks recorded with ``make_fx``, bodies built around them by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fxjacobi import ops
from fxjacobi.causal_rules.interpreter import operand_value
from fxjacobi.graph import spec_of_value, stamp
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Result, Scanned, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

aten = torch.ops.aten


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace(function: Callable[..., Any], *examples: Any) -> fx.GraphModule:
    """Record ``function`` of ATen calls as a graph with a flat output, stamped from a run on ``examples``."""
    root = getattr(function, "root", nn.Module())
    graph = _Tracer().trace(root, {}) if False else None
    del graph
    tracer = _Tracer()
    tracer.root = root
    traced = fx.GraphModule(*_record(function, len(examples)))

    class Stamp(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op != "output":
                stamp(n, spec_of_value(value))
            return value

    with torch.no_grad():
        Stamp(traced).run(*examples)
    return traced


def _record(function: Callable[..., Any], count: int) -> tuple[nn.Module, fx.Graph]:
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = [fx.Proxy(graph.placeholder(f"a{i}"), tracer) for i in range(count)]
    out = function(*proxies)
    out = out if isinstance(out, tuple) else (out,)
    graph.output(tuple(o.node if isinstance(o, fx.Proxy) else o for o in out))
    return nn.Module(), graph


class Network:
    """A module recorded as a graph of its input and tensors, to be called inside a traced body."""

    def __init__(self, module: nn.Module, *example: torch.Tensor) -> None:
        self.names = [n for n, _ in module.named_parameters()] + [n for n, _ in module.named_buffers()]
        tensors = dict(module.named_parameters()) | dict(module.named_buffers())
        self.tensors = [tensors[name].detach() for name in self.names]
        self.inputs = len(example)

        def call(*args: torch.Tensor) -> Any:
            values = dict(zip(self.names, args[self.inputs :], strict=True))
            return torch.func.functional_call(module, values, args[: self.inputs])

        with torch.no_grad():
            traced = make_fx(call)(*example, *self.tensors)
        self.graph = traced.graph
        assert not any(node.op == "get_attr" for node in self.graph.nodes), "the network holds constants of its own"

    def __call__(self, *args: Any) -> Any:
        """Replay the recorded operations on proxies (input, then tensors)."""
        values: dict[fx.Node, Any] = {}
        remaining = iter(args)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(remaining)
            elif node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            else:
                mapped, kwargs = fx.map_arg(node.args, values.__getitem__), fx.map_arg(node.kwargs, values.__getitem__)
                proxy = next((v for v in values.values() if isinstance(v, fx.Proxy)))
                values[node] = proxy.tracer.create_proxy("call_function", node.target, mapped, kwargs)
        raise AssertionError


def call(target: Any, *args: Any) -> Any:
    """Record ``target(*args)``."""
    proxy = next(a for a in args if isinstance(a, fx.Proxy))
    return proxy.tracer.create_proxy("call_function", target, args, {})


def write(base: Any, value: Any, index: tuple[Any, ...]) -> Any:
    """Record a write."""
    return call(ops.write, base, value, index)


def sampling_loop(
    body: Callable[..., Any],
    x0: torch.Tensor,
    literals: Sequence[Sequence[int]],
    noise: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    *,
    results: Sequence[Result] | None = None,
    carry: int = 0,
) -> tuple[Loop, list[torch.Tensor], list[Any]]:
    """Return ``(loop, operands, abstract operands)`` of ``body(x, *literals, noise_t, *tensors)``."""
    steps = len(literals[0]) if literals else len(noise)  # type: ignore[arg-type]
    scanned = [] if noise is None else [noise]
    examples = [x0, *(values[-1] for values in literals), *(n[-1] for n in scanned), *tensors]
    operands = [x0, *scanned, *tensors]
    bindings: list[Binding] = [Carried(carry, 1, (0,)), *(Literal(tuple(values)) for values in literals)]
    bindings += [Scanned(1, 0, range(steps)) for _ in scanned]
    first = 1 + len(scanned)
    bindings += [Invariant(first + number) for number in range(len(tensors))]
    loop = Loop(trace(body, *examples), steps, bindings, results or [Step(carry, steps - 1)])
    known = [operand_value(x0, None), *(operand_value(n, None) for n in scanned)]
    known += [operand_value(tensor, f"tensor_{number}") for number, tensor in enumerate(tensors)]
    return loop, operands, known
