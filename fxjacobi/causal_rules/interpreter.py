"""Running a graph on abstract values, through recorded submodules and inner loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from fxjacobi.causal_rules.domain import Abstract, Value, constant, unknown
from fxjacobi.causal_rules.pointwise import is_pointwise, pointwise
from fxjacobi.causal_rules.registry import Context, find_rule, tensors_in
from fxjacobi.graph import is_random
from fxjacobi.loops import Loop, Scanned, read_at
from fxjacobi.ops import GUARDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["evaluate", "interpret", "operand_value"]


def operand_value(value: object, name: str | None) -> Value:
    """Return the abstract value of a concrete one: known if ``name`` is given (a constant), else only its shape."""
    if isinstance(value, torch.Tensor):
        return constant(value, name) if name is not None else unknown(tuple(value.shape))
    if isinstance(value, (tuple, list)):
        return tuple(operand_value(item, name) for item in value)
    return value


def _is_leaf(item: object) -> bool:
    return isinstance(item, Abstract)


def _concrete(item: object) -> object:
    return item.value if isinstance(item, Abstract) else item


def _fold(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], sources: frozenset[str]) -> Value:
    """Run an operation whose tensors are all known."""
    assert callable(node.target)
    result = node.target(*tree_map(_concrete, args, is_leaf=_is_leaf), **tree_map(_concrete, kwargs, is_leaf=_is_leaf))

    def wrap(value: object) -> Value:
        if isinstance(value, torch.Tensor):
            known = constant(value)
            return Abstract(known.rank, known.known, known.value, sources)
        return tuple(wrap(item) for item in value) if isinstance(value, (tuple, list)) else value

    return wrap(result)


def evaluate(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Return the abstract value of one ``call_function`` node, given its arguments' abstract values."""
    tensors = tensors_in((args, kwargs))
    if is_random(node):
        return context.give_up(node, args, kwargs)
    if tensors and isinstance(node.target, torch._ops.OpOverload) and all(tensor.constant for tensor in tensors):
        return _fold(node, args, kwargs, frozenset().union(*(tensor.sources for tensor in tensors)))
    found = find_rule(node.target)
    if found is not None:
        return found(context, node, args, kwargs)
    if is_pointwise(node.target):
        return pointwise(context, node, args, kwargs)
    return context.give_up(node, args, kwargs)


def interpret(
    context: Context,
    module: fx.GraphModule,
    values: Mapping[fx.Node, Value] | Sequence[Value],
    names: Mapping[str, Value] | None = None,
) -> dict[fx.Node, Value]:
    """Return the abstract value of every node of ``module`` that ``values`` allows to compute.

    Args:
        context: Collects what the rules report.
        module: Graph to run.
        values: The placeholders' values in order, or the values of any nodes (those that neither are given nor follow
            from given ones are left out).
        names: Values of ``get_attr`` nodes by target; others are read from the module and known, parameters and all.
    """
    env: dict[fx.Node, Value]
    if isinstance(values, dict):
        env = dict(values)
    else:
        assert not hasattr(values, "keys")
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        env = dict(zip(placeholders, values, strict=True))
    with context.within(env):
        _run(context, module, env, names)
    return env


def _run(
    context: Context, module: fx.GraphModule, env: dict[fx.Node, Value], names: Mapping[str, Value] | None
) -> None:
    """Add to ``env`` the values of all nodes that it allows to compute."""
    lookup: Any = env.__getitem__
    for node in module.graph.nodes:
        if node in env or node.op in ("placeholder", "output"):
            continue
        if not all(used in env for used in node.all_input_nodes):
            continue
        args, kwargs = map_arg(node.args, lookup), map_arg(node.kwargs, lookup)
        if node.op == "get_attr":
            if names is not None and node.target in names:
                env[node] = names[node.target]
            else:
                attribute: Any = module
                for part in node.target.split("."):
                    attribute = getattr(attribute, part)
                env[node] = operand_value(attribute, node.target)
        elif node.op == "call_module":
            env[node] = _call(context, node, module.get_submodule(node.target), args)
        elif node.target in GUARDS:
            env[node] = None
        else:
            env[node] = evaluate(context, node, args, kwargs)


def _outputs(module: fx.GraphModule, env: Mapping[fx.Node, Value]) -> tuple[Value, ...]:
    outputs = module.graph.output_node().args[0]
    assert isinstance(outputs, tuple)
    return tuple(env[item] if isinstance(item, fx.Node) else item for item in outputs)


def _call(context: Context, node: fx.Node, module: torch.nn.Module, args: tuple[Value, ...]) -> Value:
    if isinstance(module, fx.GraphModule):
        return _outputs(module, interpret(context, module, list(args)))
    if isinstance(module, Loop):
        return _unroll(context, node, module, args)
    return context.give_up(node, args, {})


def _unroll(context: Context, node: fx.Node, loop: Loop, operands: tuple[Value, ...]) -> Value:
    """Walk an inner loop's body once a step. The solver checks no values inside, so nothing may be killed there."""
    inner = Context(context.top, may_kill=False, reads=context.reads)
    outputs: list[tuple[Value, ...]] = []
    for step in range(loop.trip_count):
        bound: list[Value] = [read_at(binding, step, operands, outputs, _selected) for binding in loop.bindings]
        outputs.append(_outputs(loop.body, interpret(inner, loop.body, bound)))
    for name in inner.unknown_ops.values():
        context.unknown_ops.setdefault(node, name)
    return loop.collect(outputs, lambda values: Abstract(torch.stack([one.rank for one in values])))


def _selected(value: Value, scanned: Scanned, index: int) -> Value:
    assert isinstance(value, Abstract)
    dim = scanned.dim
    if value.known is None or value.value is None:
        return Abstract(value.rank.select(dim, index))
    return Abstract(
        value.rank.select(dim, index), value.known.select(dim, index), value.value.select(dim, index), value.sources
    )
