"""How large values can be, from the constants and from limits on what the array and the inputs hold.

Interval arithmetic over the graph, asked for only where a finite mask has to outweigh attention scores
(:mod:`fxjacobi.causal_rules.finite_masks`). Normalisations bound what follows them whatever went in:

    ||layer_norm(x)||_2 <= 1.01 sqrt(N) max|gamma| + ||beta||_2 + what rounding adds
    |(W x)_i|           <= ||W_i||_2 ||x||_2  and  ||W_i||_1 max|x|
    ||W x||_2           <= ||W||_F ||x||_2
    |(softmax(s) V)_i|  <= max|V|

An operation without a rule here has no bound.
"""

from __future__ import annotations

import operator
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi import ops
from fxjacobi.causal_rules.domain import Abstract
from fxjacobi.causal_rules.interval import Interval, Rests, interval_of_value, symmetric
from fxjacobi.causal_rules.views import VIEWS
from fxjacobi.graph import TensorSpec, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from fxjacobi.causal_rules.registry import Context

__all__ = ["NORMALISATIONS", "UNIT", "Call", "interval_of", "magnitude", "name_of", "number"]

UNIT = 2.0**-24

NORMALISATIONS = frozenset(["native_layer_norm", "layer_norm", "native_group_norm", "group_norm"])
"""Operations that subtract a mean, and so may be larger than in exact arithmetic."""


def interval_of(context: Context, node: object) -> Interval | None:
    """Return the interval of ``node``'s elements (of its first result, where it has several), or ``None``: unbounded."""
    if not isinstance(node, torch.fx.Node):
        return number(node)
    found, lenient = context.intervals, context.lenient
    needed: set[fx.Node] = set()
    pending = [node]
    while pending:
        one = pending.pop()
        if one in needed or (one, lenient) in found:
            continue
        needed.add(one)
        if not _constant(context, one):
            pending.extend(_bounding(context, one))
    for one in node.graph.nodes if needed else ():
        # Constants are looked at when a rule asks for them: most are weights, of which rules know more.
        if one in needed and not _constant(context, one):
            found[one, lenient] = _interval(context, one)
    return _known_or_constant(context, node)


def _constant(context: Context, node: fx.Node) -> bool:
    assert context.env is not None
    value = context.env.get(node)
    return isinstance(value, Abstract) and value.constant


def _bounding(context: Context, node: fx.Node) -> list[fx.Node]:
    """Return the arguments that a bound of ``node`` may rest on."""
    if context.lenient and node.op == "call_function" and name_of(node) in NORMALISATIONS:
        return node.all_input_nodes[1:]
    return node.all_input_nodes


def _known_or_constant(context: Context, node: fx.Node) -> Interval | None:
    key = (node, context.lenient)
    if key not in context.intervals and _constant(context, node):
        assert context.env is not None
        value = context.env[node]
        assert isinstance(value, Abstract)
        assert value.value is not None
        context.intervals[key] = interval_of_value(value.value, value.sources)
    return context.intervals.get(key)


def number(value: object) -> Interval | None:
    """Return the interval of a Python number."""
    if isinstance(value, (bool, int, float)) and value == value:
        every = torch.tensor(float(value), dtype=torch.float64)
        return Interval(every, every)
    return None


def _interval(context: Context, node: fx.Node) -> Interval | None:
    if node in context.assumable:
        limit = context.assumable[node]
        return symmetric(limit, Rests(assumed=frozenset({(node, limit)})))
    if node.op != "call_function":
        return None
    rule = _RULES.get(name_of(node))
    result = rule(Call(context, node)) if rule is not None else None
    spec = spec_of(node)
    if result is None and isinstance(spec, TensorSpec) and spec.dtype == torch.bool:
        return Interval(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    return result


def name_of(node: fx.Node) -> object:
    """Return the operation's name in ATen, one name for all views; other callables as they are."""
    if isinstance(node.target, torch._ops.OpOverload):
        return "movement" if node.target in VIEWS else node.target._schema.name.removeprefix("aten::")
    others: dict[object, object] = {operator.getitem: "getitem", ops.restride: "clone", ops.write: "hull"}
    return others.get(node.target, node.target)


class Call:
    """One call: its arguments by name or position, with their intervals and what else is known of them."""

    def __init__(self, context: Context, node: fx.Node) -> None:
        self.context, self.node = context, node
        spec = spec_of(node)
        while isinstance(spec, tuple) and spec:
            spec = spec[0]
        self.spec = spec if isinstance(spec, TensorSpec) else None
        self.dtype = self.spec.dtype if self.spec is not None else torch.float32

    def get(self, which: int | str) -> Any:
        """Return an argument by position or by its name in the schema."""
        node, target = self.node, self.node.target
        if isinstance(which, int):
            return node.args[which] if which < len(node.args) else None
        if which in node.kwargs:
            return node.kwargs[which]
        assert isinstance(target, torch._ops.OpOverload)
        for position, formal in enumerate(target._schema.arguments):
            if formal.name == which:
                if position < len(node.args):
                    return node.args[position]
                return formal.default_value if formal.has_default_value() else None
        return None

    def of(self, which: int | str) -> Interval | None:
        """Return an argument's interval."""
        return self.interval(self.get(which))

    def interval(self, value: object) -> Interval | None:
        """Return the interval of a node among the arguments, or of a number."""
        return _known_or_constant(self.context, value) if isinstance(value, torch.fx.Node) else number(value)

    def shape(self, which: int | str) -> tuple[int, ...]:
        """Return a tensor argument's shape."""
        spec = spec_of(self.get(which))
        assert isinstance(spec, TensorSpec)
        return spec.shape

    def norm(self, which: int | str) -> float:
        """Return the largest Euclidean norm of a row of the result's length that is one of the argument's, broadcast."""
        assert self.spec is not None
        found, width = self.of(which), self.spec.shape[-1] if self.spec.shape else 1
        if found is None:
            return inf
        own = isinstance(self.get(which), torch.fx.Node) and self.shape(which)[-1:] == (width,)
        return found.rows(width)[0] if own else sqrt(width) * found.size

    def known(self, which: int | str) -> Abstract | None:
        """Return an argument known in full."""
        assert self.context.env is not None
        value = self.context.env.get(self.get(which)) if isinstance(self.get(which), torch.fx.Node) else None
        return value if isinstance(value, Abstract) and value.constant and value.value is not None else None


_RULES: dict[object, Callable[[Call], Interval | None]] = {}


def magnitude(*names: str) -> Callable[[Callable[[Call], Interval | None]], Callable[[Call], Interval | None]]:
    """Register a rule for operations of these names."""

    def register(function: Callable[[Call], Interval | None]) -> Callable[[Call], Interval | None]:
        for name in names:
            _RULES[name] = function
        return function

    return register
