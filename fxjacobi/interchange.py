"""Loop interchange: T independent runs of an inner loop as one run whose every step serves all T.

    for t: for s: y[t, s] = g(y[t, s-1], ...)      becomes      for s: y[:, s] = g batched (y[:, s-1], ...)

(Allen and Kennedy, Optimizing Compilers for Modern Architectures, section 5.2). Lawful because a map's equations do
not depend on one another; each operation of the inner body is batched by the way that is measured for it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxjacobi import ops
from fxjacobi.fixed_point import FixedPoint
from fxjacobi.graph import TensorSpec, spec_of, spec_of_value, stamp
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Scanned, Stacked, Table
from fxjacobi.measuring import Batcher, Frame, Target, Unmeasurable, Value
from fxjacobi.operation import Operation, Role
from fxjacobi.samples import sample

__all__ = ["interchanged"]

aten = torch.ops.aten


class _Interchange:
    """The way under construction: a graph around the inner loop, and the inner loop's batched body."""

    def __init__(self, batcher: Batcher, frame: Frame, operation: Operation, loop: Loop) -> None:
        self.batcher, self.frame, self.operation, self.loop = batcher, frame, operation, loop
        self.graph = fx.Graph()
        self.env = {n: stamp(self.graph.placeholder(n.name), spec_of(n)) for n in operation.inputs}
        self.arguments: tuple[Any, ...] = operation.node.args
        self.operands: list[fx.Node] = []
        self.target = Target()

    def role(self, operand: int) -> Role:
        """The role of an operand over the outer steps."""
        return self.frame.values[self.arguments[operand]].role

    def operand(self, index: int, *, batched: bool) -> int:
        """Return the new position of an operand, with a leading T if asked."""
        node = self.env[self.arguments[index]]
        if batched and self.role(index) is Role.UNIFORM:
            spec = spec_of(self.arguments[index])
            assert isinstance(spec, TensorSpec)
            wide = self.graph.call_function(aten.expand.default, (node, [self.batcher.steps, *spec.shape]))
            node = self.graph.call_function(aten.contiguous.default, (wide,))
        if node not in self.operands:
            self.operands.append(node)
        return self.operands.index(node)

    def whole(self, index: int, replica: int) -> Any:
        """The data of an operand, ``(T, ...)`` if batched."""
        return self.frame.values[self.arguments[index]].batched[replica]

    def single(self, index: int, replica: int, step: int) -> Any:
        """The data of an operand at one outer step."""
        return self.frame.step_value(self.arguments[index], replica, step)

    def bind(self, node: fx.Node, binding: Binding) -> tuple[Binding, Value]:
        """Return the new binding of a placeholder of the body, and data for it at one inner step."""
        replicas, emitted = range(self.batcher.replicas), self.target.graph.placeholder(node.name)
        new: Binding
        match binding:
            case Carried(output, distance, init):
                new = Carried(output, distance, tuple(self.operand(i, batched=True) for i in init))
                # Initial states are often zeros, on which everything agrees; random ones tell more.
                spec = spec_of(node)
                assert isinstance(spec, TensorSpec)
                singles = [
                    [sample(spec, r * self.batcher.steps + t) for t in range(self.batcher.steps)] for r in replicas
                ]
                value = Value(Role.BATCHED, [torch.stack(s) for s in singles], lambda r, t: singles[r][t], emitted)
            case Scanned(operand, dim, indices) if self.role(operand) is Role.BATCHED:
                new = Scanned(self.operand(operand, batched=True), dim + 1, indices)
                whole = [self.whole(operand, r).select(dim + 1, indices[0]) for r in replicas]
                value = Value(
                    Role.BATCHED, whole, lambda r, t: self.single(operand, r, t).select(dim, indices[0]), emitted
                )
            case Scanned(operand, dim, indices):
                new = Scanned(self.operand(operand, batched=False), dim, indices, binding.owned)
                whole = [self.whole(operand, r).select(dim, indices[0]) for r in replicas]
                value = Value(Role.UNIFORM, whole, lambda r, _t: whole[r], emitted)
            case Table(table):
                batched = any(self.role(i) is Role.BATCHED for i in table)
                new = Table(tuple(self.operand(i, batched=batched) for i in table))
                role = Role.BATCHED if batched else Role.UNIFORM
                whole = [self.whole(table[0], r) for r in replicas]
                if batched and self.role(table[0]) is Role.UNIFORM:
                    whole = [w.expand(self.batcher.steps, *w.shape).contiguous() for w in whole]
                value = Value(role, whole, lambda r, t: self.single(table[0], r, t), emitted)
            case Invariant(operand):
                new = Invariant(self.operand(operand, batched=False))
                whole = [self.whole(operand, r) for r in replicas]
                value = Value(self.role(operand), whole, lambda r, t: self.single(operand, r, t), emitted)
            case _:
                assert isinstance(binding, Literal)
                # One number for all outer steps, though another at each inner one.
                new = binding
                value = Value(
                    Role.UNIFORM, [binding.values[0]] * len(replicas), lambda _r, _t: binding.values[0], emitted
                )
        stamp(emitted, spec_of_value(value.batched[0]))
        return new, value

    def build(self, *, stops_early: bool) -> fx.GraphModule:
        """Return the graph from the operation's inputs to the inner loop's results."""
        placeholders = [n for n in self.loop.body.graph.nodes if n.op == "placeholder"]
        bound = [self.bind(n, b) for n, b in zip(placeholders, self.loop.bindings, strict=True)]
        values = {n: value for n, (_, value) in zip(placeholders, bound, strict=True)}
        outputs = Frame(self.batcher, self.loop.body, values, self.target).run()
        emitted = [self.batcher.emit_at_all_steps(o, self.target.graph) for o in outputs]
        body = self.target.module(emitted)
        inner = Loop(body, self.loop.trip_count, [binding for binding, _ in bound], self.loop.results)
        module = FixedPoint(inner) if stops_early else inner
        call = self.graph.call_module("inner", tuple(self.operands))
        results = []
        for i, result in enumerate(self.loop.results):
            value = self.graph.call_function(operator.getitem, (call, i))
            if isinstance(result, Stacked):
                value = self.graph.call_function(aten.movedim.int, (value, 0, 1))
            results.append(value)
        self.graph.output(tuple(results))
        return fx.GraphModule({"inner": module}, self.graph)


def interchanged(
    batcher: Batcher, frame: Frame, operation: Operation, module: Loop | FixedPoint
) -> fx.GraphModule | None:
    """Return ``operation``, a call of an inner loop, with the loops interchanged; ``None`` where that cannot be.

    It cannot where the inner body holds guards (their steps are told apart by the outer loop) or what cannot be run on
    random data.
    """
    loop = module.loop if isinstance(module, FixedPoint) else module
    if operation.has_literals or any(n.target in ops.GUARDS for n in loop.body.graph.nodes):
        return None
    before = len(batcher.choices)
    try:
        return _Interchange(batcher, frame, operation, loop).build(stops_early=isinstance(module, FixedPoint))
    except Unmeasurable:
        del batcher.choices[before:]
        return None
