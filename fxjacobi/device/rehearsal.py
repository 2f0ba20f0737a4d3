"""Running a body on the CPU first, where an index out of range is an exception, before a device meets the same data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxjacobi import ops
from fxjacobi.device.hazards import may_assert
from fxjacobi.emit import rebuilt
from fxjacobi.loops import Loop
from fxjacobi.trial import MISFITS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["on_cpu", "rehearse", "rehearse_call"]

_CPU = torch.device("cpu")


def on_cpu(body: fx.GraphModule) -> fx.GraphModule:
    """Return ``body`` with every device that it names replaced by the CPU."""
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    modules: dict[str, nn.Module] = {}

    def argument(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return env[value]
        if isinstance(value, torch.device):
            return _CPU
        if isinstance(value, (tuple, list)):
            return type(value)(argument(item) for item in value)
        return value

    for node in body.graph.nodes:
        if node.op == "call_module":
            modules[str(node.target)] = _module_on_cpu(body.get_submodule(str(node.target)))
        args = tuple(argument(a) for a in node.args)
        kwargs = {name: argument(value) for name, value in node.kwargs.items()}
        if node.op == "output":
            graph.output(args[0])
        else:
            env[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)
            env[node].meta = dict(node.meta)
    return rebuilt(body, graph, modules)


def _module_on_cpu(module: nn.Module) -> nn.Module:
    if isinstance(module, fx.GraphModule):
        return on_cpu(module)
    loop = module if isinstance(module, Loop) else getattr(module, "loop", None)
    if isinstance(loop, Loop):
        return Loop(on_cpu(loop.body), loop.trip_count, loop.bindings, loop.results)
    return module


def rehearse(loop: Loop, samples: Iterable[Sequence[torch.Tensor]]) -> str | None:
    """Return why the loop must not run on the ``samples`` on a device, or ``None`` where it may.

    Nothing is run where all samples are on the CPU, or where no operation of the body can fail inside a kernel.
    """
    samples = list(samples)
    if all(o.device.type == "cpu" for operands in samples for o in operands) or not may_assert(loop.body):
        return None
    twin = Loop(on_cpu(_without_guards(loop.body)), loop.trip_count, loop.bindings, loop.results)
    return next((stopped for operands in samples if (stopped := _stopped(twin, operands)) is not None), None)


def rehearse_call(body: fx.GraphModule, arguments: Sequence[Any]) -> str | None:
    """:func:`rehearse` for one call of a graph."""
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    if all(t.device.type == "cpu" for t in tensors) or not may_assert(body):
        return None
    return _stopped(on_cpu(_without_guards(body)), arguments)


@torch.no_grad()
def _stopped(twin: nn.Module, arguments: Sequence[Any]) -> str | None:
    try:
        twin(*(a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments))
    except MISFITS as misfit:
        return f"on random data it would stop the device: {str(misfit).strip().splitlines()[0]}"
    return None


def _without_guards(body: fx.GraphModule) -> fx.GraphModule:
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in body.graph.nodes:
        if node.target not in ops.GUARDS:
            env[node] = graph.node_copy(node, env.__getitem__)
    return rebuilt(body, graph, {})
