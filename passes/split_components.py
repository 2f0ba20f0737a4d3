"""Split every loop into one loop for each strongly connected component of its body (loop distribution)."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import torch
from torch import fx, nn

from fxjacobi import ops
from fxjacobi.distribution import Block, Distribution, distribute
from fxjacobi.emit import call, rebuilt, tensors_of
from fxjacobi.equations import body_outputs, equations_of, is_effect
from fxjacobi.errors import PassError
from fxjacobi.graph import Spec, TensorSpec, is_random, site_of, spec_of, stamp
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Result, Scanned, Stacked, Step, Table
from fxjacobi.passes.base import Pass, PassResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["SplitComponents", "refusal"]

aten = torch.ops.aten

_FEW = 8


@dataclass(frozen=True, slots=True)
class _Operand:
    """Operand ``index`` of the loop that is split."""

    index: int


@dataclass(frozen=True, slots=True)
class _Hoisted:
    """The loop-invariant ``node``, computed before the blocks."""

    node: fx.Node


@dataclass(frozen=True, slots=True)
class _Stack:
    """``node`` at all steps, ``(T, ...)``."""

    node: fx.Node


@dataclass(frozen=True, slots=True)
class _At:
    """``node`` at one step."""

    node: fx.Node
    step: int


_Reference: TypeAlias = _Operand | _Hoisted | _Stack | _At
"""A value in the straight code around the blocks."""


@dataclass
class _Draft:
    """A block whose body grows by demand: later blocks ask it for values, and it asks earlier ones."""

    block: Block
    exports: dict[_Stack | _At, None] = field(default_factory=dict)
    operands: dict[_Reference, int] = field(default_factory=dict)
    bindings: list[Binding] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    body: fx.GraphModule | None = None

    def operand(self, reference: _Reference) -> int:
        return self.operands.setdefault(reference, len(self.operands))


class _Split:
    """One loop's way into blocks: bodies are drafted last block first, then emitted first block first."""

    def __init__(self, distribution: Distribution) -> None:
        self.loop = distribution.loop
        self.outputs = body_outputs(self.loop.body)
        self.distribution = distribution
        self.bindings = distribution.equations.bindings
        self.position = {node: i for i, node in enumerate(self.loop.body.graph.nodes)}
        self.drafts = [_Draft(block) for block in distribution.blocks]
        self.results = [self._result(result) for result in self.loop.results]
        for draft in reversed(self.drafts):
            self._draft_body(draft)

    # References: where a value of the old body is to be had outside it.

    def _result(self, result: Result) -> _Reference:
        node = self.outputs[result.output]
        if isinstance(result, Step):
            return self._at(node, result.step)
        return self._stack(node)

    def _at(self, node: fx.Node, step: int) -> _Reference:
        """Ask for ``node`` at ``step``."""
        binding = self.bindings.get(node)
        match binding:
            case Invariant(operand):
                return _Operand(operand)
            case Table(operands):
                return _Operand(operands[step])
            case Carried(output, distance, init):
                if step < distance:
                    return _Operand(init[step])
                return self._at(self.outputs[output], step - distance)
        if node in self.distribution.equations.invariant:
            return _Hoisted(node)
        reference = _At(node, step)
        if binding is None:
            self.drafts[self.distribution.home[node]].exports[reference] = None
        return reference

    def _stack(self, node: fx.Node) -> _Reference:
        """Ask for ``node`` at all steps."""
        reference = _Stack(node)
        if node in self.distribution.home:
            behind = self.distribution.delayed(node) if node.op == "placeholder" else None
            if behind is None:
                self.drafts[self.distribution.home[node]].exports[reference] = None
                return reference
        if isinstance(self.bindings.get(node), Carried):
            behind = self.distribution.delayed(node)
            assert behind is not None
            if behind.distance < self.loop.trip_count:
                self._stack(behind.base)
        return reference

    # Bodies.

    def _draft_body(self, draft: _Draft) -> None:
        """Build the body of ``draft`` from what is asked of it."""
        component = set(self.distribution.equations.graph.nodes).intersection(draft.block.nodes)
        own = [n for n in draft.block.nodes if self._is_root(n, draft, component)]
        own += [reference.node for reference in draft.exports]
        members, imports = self._closure(own, draft.block)
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        carries: list[tuple[int, fx.Node, int, tuple[int, ...]]] = []
        relaid = []
        for node in sorted([*imports, *(n for n in members if n.op == "placeholder")], key=self.position.__getitem__):
            binding = self.bindings.get(node)
            own_carry = node in members
            behind = self.distribution.delayed(node) if isinstance(binding, Carried) and not own_carry else None
            if own_carry:
                assert isinstance(binding, Carried)
                init = tuple(draft.operand(_Operand(i)) for i in binding.init)
                carries.append((len(draft.bindings), self.outputs[binding.output], binding.distance, init))
                draft.bindings.append(Carried(-1, binding.distance, init))
                env[node] = self._placeholder(graph, node, spec_of(node))
            elif behind is not None and self._passes_through(node, draft.block):
                # Initial and later values are laid out differently: stacking them would change what kernels see.
                if behind.base not in env:
                    env[behind.base] = self._import(graph, draft, behind.base, relaid)
                init = tuple(draft.operand(_Operand(i)) for i in behind.init)
                carries.append((len(draft.bindings), behind.base, behind.distance, init))
                draft.bindings.append(Carried(-1, behind.distance, init))
                env[node] = self._placeholder(graph, node, spec_of(node))
            elif node not in env:
                env[node] = self._import(graph, draft, node, relaid)
        for node in relaid:
            spec = spec_of(node)
            assert isinstance(spec, TensorSpec)
            env[node] = stamp(graph.call_function(ops.restride, (env[node], spec.stride)), spec, site_of(node))
        for node in sorted((n for n in members if n.op != "placeholder"), key=self.position.__getitem__):
            env[node] = graph.node_copy(node, env.__getitem__)

        produced: dict[fx.Node, int] = {}
        for slot, producer, distance, init in carries:
            index = produced.setdefault(producer, len(produced))
            draft.bindings[slot] = Carried(index, distance, init)
        for reference in draft.exports:
            index = produced.setdefault(reference.node, len(produced))
            if isinstance(reference, _Stack):
                draft.results.append(Stacked(index))
            else:
                draft.results.append(Step(index, draft.block.steps.index(reference.step)))
        graph.output(tuple(env[node] for node in produced))
        draft.body = rebuilt(self.loop.body, graph, {})

    def _is_root(self, node: fx.Node, draft: _Draft, component: set[fx.Node]) -> bool:
        if not draft.block.recurrence:
            return is_effect(node)
        representative = self.distribution.representative
        in_component = any(
            node in c.nodes for c in self.distribution.equations.recurrences if representative[node] in c.nodes
        )
        return node in component and in_component

    def _closure(self, roots: Sequence[fx.Node], block: Block) -> tuple[set[fx.Node], set[fx.Node]]:
        """Return the nodes that the block evaluates, and those that it reads from elsewhere."""
        members: set[fx.Node] = set()
        imports: set[fx.Node] = set()
        own = frozenset(block.nodes)
        pending = list(roots)
        while pending:
            node = pending.pop()
            if node in members or node in imports:
                continue
            if node in own or (not self.distribution.is_source(node) and self.distribution.is_copied(node)):
                members.add(node)
                pending.extend(node.all_input_nodes)
            else:
                imports.add(node)
        return members, imports

    def _few(self, block: Block) -> bool:
        return len(block.steps) == 1 or len(block.steps) <= min(_FEW, self.loop.trip_count // 2)

    def _passes_through(self, node: fx.Node, block: Block) -> bool:
        behind = self.distribution.delayed(node)
        if behind is None or behind.uniform or self._few(block) or behind.distance >= self.loop.trip_count:
            return False
        return not self._by_table(behind.base)

    def _by_table(self, base: fx.Node) -> bool:
        return base in self.distribution.equations.invariant or isinstance(self.bindings.get(base), Table)

    def _import(self, graph: fx.Graph, draft: _Draft, node: fx.Node, relaid: list[fx.Node]) -> fx.Node:
        """Add a placeholder for ``node`` of elsewhere, with its binding."""
        steps, binding, spec = draft.block.steps, self.bindings.get(node), spec_of(node)
        behind = self.distribution.delayed(node) if isinstance(binding, Carried) else None
        new: Binding
        if node in self.distribution.equations.invariant:
            new = Invariant(draft.operand(self._at(node, 0)))
        elif isinstance(binding, Literal):
            new = Literal(tuple(binding.values[t] for t in steps))
        elif isinstance(binding, Scanned):
            every = len(steps) == self.loop.trip_count
            indices = binding.indices if every else tuple(binding.indices[t] for t in steps)
            new = Scanned(draft.operand(_Operand(binding.operand)), binding.dim, indices)
        elif (
            isinstance(binding, Table)
            or self._few(draft.block)
            or (behind is not None and (behind.distance >= self.loop.trip_count or self._by_table(behind.base)))
        ):
            new = Table(tuple(draft.operand(self._at(node, t)) for t in steps))
        else:
            new = Scanned(draft.operand(self._stack(node)), 0, range(self.loop.trip_count))
            assert isinstance(spec, TensorSpec)
            dense = TensorSpec(spec.shape, spec.dtype, spec.device, _dense_stride(spec.shape))
            if any(size > 1 and a != b for size, a, b in zip(spec.shape, spec.stride, dense.stride, strict=True)):
                relaid.append(node)
                spec = dense
        draft.bindings.append(new)
        return self._placeholder(graph, node, spec)

    def _placeholder(self, graph: fx.Graph, node: fx.Node, spec: Spec) -> fx.Node:
        return stamp(graph.placeholder(node.name), spec, site_of(node))

    # Emission into the graph around the loop.

    def emit(self, into: _Rewriter, operands: Sequence[fx.Node]) -> list[fx.Node]:
        """Append hoisted nodes, blocks and the values between them; return a node for each result of the loop."""
        graph, made = into.graph, dict[_Reference, fx.Node]()
        hoisted: dict[fx.Node, fx.Node] = {}
        for node, binding in self.bindings.items():
            if isinstance(binding, Invariant):
                hoisted[node] = operands[binding.operand]
        for node in self.loop.body.graph.nodes:
            if node in self.distribution.equations.invariant and node in self.distribution.live:
                if node.op != "placeholder":
                    hoisted[node] = into.copy(node, hoisted, self.loop.body)
                made[_Hoisted(node)] = hoisted[node]

        def materialise(reference: _Reference) -> fx.Node:
            if reference not in made:
                match reference:
                    case _Operand(index):
                        made[reference] = operands[index]
                    case _At(node, step):
                        binding = self.bindings[node]
                        assert isinstance(binding, Scanned)
                        source = operands[binding.operand]
                        made[reference] = call(graph, aten.select.int, source, binding.dim, binding.indices[step])
                    case _Stack(node):
                        made[reference] = self._emit_stack(node, graph, materialise)
                    case _Hoisted():
                        raise AssertionError(reference)
            return made[reference]

        for draft in self.drafts:
            if not draft.exports and not any(is_effect(n) for n in draft.block.nodes):
                continue
            values = [materialise(reference) for reference in draft.operands]
            for reference, value in zip(draft.exports, self._emit_block(draft, into, values), strict=True):
                made[reference] = value
        return [materialise(reference) for reference in self.results]

    def _emit_stack(self, node: fx.Node, graph: fx.Graph, materialise: _Materialise) -> fx.Node:
        """Append ``node`` of all steps, where no block makes it: a delayed value, or something from outside."""
        trip_count, binding = self.loop.trip_count, self.bindings.get(node)
        behind = self.distribution.delayed(node) if isinstance(binding, Carried) else None
        if isinstance(binding, Scanned):
            source = materialise(_Operand(binding.operand))
            pieces = [call(graph, aten.select.int, source, binding.dim, i) for i in binding.indices]
            if pieces and list(binding.indices) == list(range(binding.indices[0], binding.indices[0] + trip_count)):
                for piece in reversed(pieces):
                    graph.erase_node(piece)
                start = binding.indices[0]
                part = call(graph, aten.slice.Tensor, source, binding.dim, start, start + trip_count)
                return call(graph, aten.clone.default, call(graph, aten.movedim.int, part, binding.dim, 0))
            return call(graph, aten.stack.default, pieces)
        if behind is None or behind.distance >= trip_count or self._by_table(behind.base):
            return call(graph, aten.stack.default, [materialise(self._at(node, t)) for t in range(trip_count)])
        first = call(graph, aten.stack.default, [materialise(_Operand(i)) for i in behind.init])
        rest = call(
            graph, aten.slice.Tensor, materialise(_Stack(behind.base)), 0, 0, trip_count - behind.distance
        )
        return call(graph, aten.cat.default, [first, rest])

    def _emit_block(self, draft: _Draft, into: _Rewriter, operands: Sequence[fx.Node]) -> list[fx.Node]:
        assert draft.body is not None
        if len(draft.block.steps) == 1 and not draft.block.recurrence:
            return self._emit_straight(draft, into, operands)
        loop = Loop(draft.body, len(draft.block.steps), draft.bindings, draft.results)
        outputs = body_outputs(draft.body)
        specs = []
        for result in loop.results:
            spec = spec_of(outputs[result.output])
            if isinstance(result, Stacked):
                assert isinstance(spec, TensorSpec)
                shape = (loop.trip_count, *spec.shape)
                spec = TensorSpec(shape, spec.dtype, spec.device, _dense_stride(shape))
            specs.append(spec)
        target = into.add(loop.kind.value, loop)
        sites = (site_of(node) for node in draft.body.graph.nodes if node.op.startswith("call"))
        node = into.graph.call_module(target, tuple(operands))
        stamp(node, tuple(specs), next((site for site in sites if site is not None), None))
        return [
            stamp(into.graph.call_function(operator.getitem, (node, i)), spec, site_of(node))
            for i, spec in enumerate(specs)
        ]

    def _emit_straight(self, draft: _Draft, into: _Rewriter, operands: Sequence[fx.Node]) -> list[fx.Node]:
        """Append the one step of a block as straight code."""
        assert draft.body is not None
        env: dict[fx.Node, object] = {}
        placeholders = [node for node in draft.body.graph.nodes if node.op == "placeholder"]
        for node, binding in zip(placeholders, draft.bindings, strict=True):
            match binding:
                case Scanned(operand, dim, indices):
                    env[node] = call(into.graph, aten.select.int, operands[operand], dim, indices[0])
                case Table(table):
                    env[node] = operands[table[0]]
                case Literal(values):
                    env[node] = values[0]
                case Invariant(operand):
                    env[node] = operands[operand]
        for node in draft.body.graph.nodes:
            if node.op not in ("placeholder", "output"):
                env[node] = into.copy(node, env, draft.body)
        outputs = body_outputs(draft.body)
        values = [env[outputs[result.output]] for result in draft.results]
        nodes = [value for value in values if isinstance(value, fx.Node)]
        assert len(nodes) == len(values)
        return [
            call(into.graph, aten.unsqueeze.default, node, 0) if isinstance(result, Stacked) else node
            for node, result in zip(nodes, draft.results, strict=True)
        ]
