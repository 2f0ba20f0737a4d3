"""One operation of a map's body, and the pieces that ways to evaluate it for all T steps are made of.

A value in a map's body is, at T steps, *batched* ``(T, ...)``, *uniform* (the same at every step) or a *literal* (one
Python value a step). A way is a small graph from the operation's batched and uniform inputs to its batched output.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

from fxjacobi.graph import TensorSpec, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Env", "Operation", "Role", "Way", "arguments", "expanded", "rank_of", "record", "small_graph", "with_rank"]

aten = torch.ops.aten


class Way(Enum):
    """How an operation of T equations is evaluated."""

    DIRECT = "the operation itself, on the stacked values"
    FLATTENED = "the steps folded into the rows or the batch of one call"
    BATCHED_MATMUL = "one slice a step of a batched matrix product"
    ALIGNED_MATMUL = "the same, each slice aligned in memory as a tensor of its own"
    GATHERED = "one gather in place of T indexings"
    MAPPED = "the operation under torch.func.vmap"
    ROWS_APART = "one strided row a step, so that each has its own scalar tail"
    INTERCHANGED = "the inner loop once, each of its steps for all outer steps"
    ONE_BY_ONE = "step by step, then stacked"


class Role(Enum):
    """What a value of the body is over T steps."""

    BATCHED = "one tensor a step, stacked"
    UNIFORM = "the same at every step"
    LITERAL = "one Python value a step"


@dataclass(frozen=True)
class Operation:
    """One node of a map's body, with the role of each node that it reads.

    Args:
        node: The node; not all of its inputs are uniform.
        steps: The number of equations T.
        roles: The role of each input.
        literals: The values of each literal input.
        owner: The module whose graph the node is of.
    """

    node: fx.Node
    steps: int
    roles: Mapping[fx.Node, Role]
    literals: Mapping[fx.Node, tuple[Any, ...]]
    owner: fx.GraphModule

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The tensors it reads."""
        return tuple(n for n in self.node.all_input_nodes if self.roles[n] is not Role.LITERAL)

    @property
    def tensors(self) -> tuple[fx.Node, ...]:
        """Those of its inputs that are tensors; a number that is the same at every step is none."""
        return tuple(n for n in self.inputs if isinstance(spec_of(n), TensorSpec))

    @property
    def has_literals(self) -> bool:
        """Whether a Python value among its arguments changes from step to step."""
        return any(self.roles[n] is Role.LITERAL for n in self.node.all_input_nodes)

    def is_batched(self, argument: Any) -> bool:
        """Whether ``argument`` is a batched node."""
        return isinstance(argument, fx.Node) and self.roles[argument] is Role.BATCHED

    def shape(self, argument: Any) -> tuple[int, ...]:
        """Shape of a tensor argument at one step."""
        spec = spec_of(argument)
        assert isinstance(spec, TensorSpec)
        return spec.shape


Env: TypeAlias = dict[fx.Node, Any]


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value


def small_graph(operation: Operation, build: Callable[[Env], Any]) -> fx.GraphModule:
    """Record what ``build`` does with proxies of the operation's inputs."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    env = {n: fx.Proxy(graph.placeholder(n.name), tracer) for n in operation.inputs}
    result = build(env)
    graph.output(fx.node.map_aggregate(result, _node_of))
    return fx.GraphModule({}, graph)


def record(function: Callable[..., Any], *args: Any) -> fx.Proxy:
    """Append a call of a function of :mod:`fxjacobi.batched`."""
    proxy = next(a for a in args if isinstance(a, fx.Proxy))
    return proxy.tracer.create_proxy("call_function", function, args, {})


def arguments(operation: Operation, env: Env) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return its arguments, with what ``env`` holds for each node."""
    args: Any = fx.map_arg(operation.node.args, lambda n: env[n])
    kwargs: Any = fx.map_arg(operation.node.kwargs, lambda n: env[n])
    return args, kwargs


def rank_of(operation: Operation) -> int:
    """The most dimensions that one of its tensors has at one step."""
    return max(len(operation.shape(n)) for n in operation.tensors)


def with_rank(operation: Operation, node: fx.Node, env: Env, rank: int) -> Any:
    """Put ones between a batched value's steps and its own dimensions, so that it broadcasts as at one step."""
    if operation.roles[node] is Role.UNIFORM or len(operation.shape(node)) == rank:
        return env[node]
    shape = operation.shape(node)
    return aten.reshape.default(env[node], [operation.steps, *[1] * (rank - len(shape)), *shape])


def expanded(operation: Operation, node: fx.Node, env: Env) -> Any:
    """Return ``node`` with a leading dimension of T, whatever its role."""
    if operation.roles[node] is Role.BATCHED or node not in operation.tensors:
        return env[node]
    return aten.expand.default(env[node], [operation.steps, *operation.shape(node)])
