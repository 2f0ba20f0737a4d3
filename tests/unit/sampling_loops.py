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
from fxjacobi.causality import CausalityProof, prove
from fxjacobi.graph import stamp_all
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Result, Scanned, Step
from fxjacobi.passes.canonicalize import Canonicalize
from fxjacobi.passes.collapse_writes import CollapseWrites
from fxjacobi.passes.eliminate import Eliminate
from fxjacobi.passes.hoist_random import HoistRandom
from fxjacobi.passes.roll_loops import RollLoops
from fxjacobi.passes.split_components import SplitComponents
from fxjacobi.sampling import JacobiWrites
from tests.unit.sampling_models import made

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "Sampling", "call", "chain", "guess_overflows", "made_loop", "recorded", "rolled", "same", "sampling_loop", "solve", "write",
]  # fmt: skip

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


def _trace(function: Callable[..., Any], examples: Sequence[Any]) -> fx.GraphModule:
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    outputs = function(*(fx.Proxy(graph.placeholder(f"a{i}"), tracer) for i in range(len(examples))))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    graph.output(tuple(output.node for output in outputs))
    traced = fx.GraphModule(nn.Module(), graph)
    with torch.no_grad():
        stamp_all(traced, examples)
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


def solve(sampling: Sampling, *, window: int | None = None) -> tuple[JacobiWrites, tuple[Any, ...]]:
    """Prove the loop causal, and return its block and the block's results."""
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof), proof
    block = JacobiWrites(proof, window=window)
    with torch.no_grad():
        return block, block(*sampling.operands)


def same(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> bool:
    """Whether results are equal, NaN to NaN; shapes and dtypes must be."""
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if not torch.equal(torch.nan_to_num(a, 7.5), torch.nan_to_num(b, 7.5)) or not torch.equal(a.isnan(), b.isnan()):
            return False
    return True


def made_loop(
    size: int = 12, batch: int = 3, start: torch.Tensor | None = None, noise: torch.Tensor | None = None, **kwargs: Any
) -> Sampling:
    """``x[:, t] = mean_t(x) + exp(scale_t(x)) * noise_t``."""
    start = torch.zeros(batch, size) if start is None else start
    net, tensors = recorded(made(size, 32), start)
    noise = torch.randn(size, batch) if noise is None else noise

    def body(x: Any, t: Any, n: Any, *weights: Any) -> Any:
        out = net(x, *weights)
        mean = call(aten.select.int, call(aten.slice.Tensor, out, 1, 0, size), 1, t)
        scale = call(aten.select.int, call(aten.slice.Tensor, out, 1, size, 2 * size), 1, t)
        value = call(aten.add.Tensor, mean, call(aten.mul.Tensor, call(aten.exp.default, scale), n))
        return write(x, value, (None, t)), value, scale

    return sampling_loop(body, start, [range(size)], noise, tensors, **kwargs)


def chain(grow: float, size: int = 10) -> Sampling:
    """``x[t] = f(w_t . x)`` with ``w`` strictly lower triangular, where ``f`` swings and guesses overflow."""
    weight = torch.full((size, size), grow).tril(-1)

    def body(x: Any, t: Any, n: Any, w: Any) -> Any:
        squared = call(aten.mul.Tensor, x, x)
        mixed = call(aten.mm.default, squared, call(aten.t.default, w))
        value = call(aten.sub.Tensor, n, call(aten.select.int, mixed, 1, t))
        return write(x, value, (None, t))

    torch.manual_seed(0)
    return sampling_loop(body, torch.zeros(2, size), [range(size)], torch.randn(size, 2), [weight])


def guess_overflows() -> Sampling:
    """``x[0]`` = 1, ``x[1] = exp(200 (0.5 - x[0]))``, ``x[2] = -x[1]``, ...: finite in order, infinite as a first guess."""
    size = 6
    weight = torch.zeros(size, size)
    weight[1, 0], weight[2, 1], weight[3, 2], weight[4, 3], weight[5, 4] = -200.0, 1.0, 1.0, 1.0, 1.0
    bias = torch.tensor([0.0, 100.0, 0.0, 0.0, 0.0, 0.0])

    def body(x: Any, t: Any, n: Any, w: Any, b: Any) -> Any:
        out = call(aten.exp.default, call(aten.addmm.default, b, x, call(aten.t.default, w)))
        value = call(aten.mul.Tensor, call(aten.select.int, out, 1, t), n)
        return write(x, value, (None, t))

    return sampling_loop(body, torch.zeros(2, size), [range(size)], torch.ones(size, 2), [weight, bias])
