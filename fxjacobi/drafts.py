"""Bodies for the blocks of a split loop, and which values they hand one another.

A value made in one block and read in another at the same step is stacked by the first, ``(T, ...)``, and scanned by the
second. A carry whose producer is in another block is that stack, delayed: initial values in front, the last ones off.
Bodies are drafted last block first, so that each block knows what is asked of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from torch import fx

from fxjacobi import ops
from fxjacobi.distribution import FEW, Block, Distribution
from fxjacobi.emit import dense_stride, is_dense, rebuilt
from fxjacobi.equations import body_outputs, is_effect
from fxjacobi.graph import Spec, TensorSpec, site_of, spec_of, stamp
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Result, Scanned, Stacked, Step, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["At", "Draft", "Drafts", "Hoisted", "Operand", "Reference", "Stack"]


@dataclass(frozen=True, slots=True)
class Operand:
    """Operand ``index`` of the loop that is split."""

    index: int


@dataclass(frozen=True, slots=True)
class Hoisted:
    """The loop-invariant ``node``, computed before the blocks."""

    node: fx.Node


@dataclass(frozen=True, slots=True)
class Stack:
    """``node`` at all steps, ``(T, ...)``."""

    node: fx.Node


@dataclass(frozen=True, slots=True)
class At:
    """``node`` at one step."""

    node: fx.Node
    step: int


Reference: TypeAlias = Operand | Hoisted | Stack | At
"""A value in the straight code around the blocks."""


@dataclass
class Draft:
    """A block whose body grows by demand: later blocks ask it for values, and it asks earlier ones."""

    block: Block
    exports: dict[Stack | At, None] = field(default_factory=dict)
    operands: dict[Reference, int] = field(default_factory=dict)
    bindings: list[Binding] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    body: fx.GraphModule | None = None

    def operand(self, reference: Reference) -> int:
        return self.operands.setdefault(reference, len(self.operands))


class Drafts:
    """One loop's way into blocks: bodies are drafted last block first, then emitted first block first."""

    def __init__(self, distribution: Distribution) -> None:
        self.loop = distribution.loop
        self.outputs = body_outputs(self.loop.body)
        self.distribution = distribution
        self.bindings = distribution.equations.bindings
        self.position = {node: i for i, node in enumerate(self.loop.body.graph.nodes)}
        self.drafts = [Draft(block) for block in distribution.blocks]
        self.results = [self._result(result) for result in self.loop.results]
        for draft in reversed(self.drafts):
            self._draft_body(draft)

    # References: where a value of the old body is to be had outside it.

    def _result(self, result: Result) -> Reference:
        node = self.outputs[result.output]
        if isinstance(result, Step):
            return self._at(node, result.step)
        return self._stack(node)

    def _at(self, node: fx.Node, step: int) -> Reference:
        """Ask for ``node`` at ``step``."""
        binding = self.bindings.get(node)
        match binding:
            case Invariant(operand):
                return Operand(operand)
            case Table(operands):
                return Operand(operands[step])
            case Carried(output, distance, init):
                if step < distance:
                    return Operand(init[step])
                return self._at(self.outputs[output], step - distance)
        if node in self.distribution.equations.invariant:
            return Hoisted(node)
        reference = At(node, step)
        if binding is None:
            self.drafts[self.distribution.home[node]].exports[reference] = None
        return reference

    def _stack(self, node: fx.Node) -> Reference:
        """Ask for ``node`` at all steps."""
        reference = Stack(node)
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

    def _draft_body(self, draft: Draft) -> None:
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
                init = tuple(draft.operand(Operand(i)) for i in binding.init)
                carries.append((len(draft.bindings), self.outputs[binding.output], binding.distance, init))
                draft.bindings.append(Carried(-1, binding.distance, init))
                env[node] = self._placeholder(graph, node, spec_of(node))
            elif behind is not None and self._passes_through(node, draft.block):
                # Initial and later values are laid out differently: stacking them would change what kernels see.
                if behind.base not in env:
                    env[behind.base] = self._import(graph, draft, behind.base, relaid)
                init = tuple(draft.operand(Operand(i)) for i in behind.init)
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
            if isinstance(reference, Stack):
                draft.results.append(Stacked(index))
            else:
                draft.results.append(Step(index, draft.block.steps.index(reference.step)))
        graph.output(tuple(env[node] for node in produced))
        draft.body = rebuilt(self.loop.body, graph, {})

    def _is_root(self, node: fx.Node, draft: Draft, component: set[fx.Node]) -> bool:
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

    def _import(self, graph: fx.Graph, draft: Draft, node: fx.Node, relaid: list[fx.Node]) -> fx.Node:
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
            new = Scanned(draft.operand(Operand(binding.operand)), binding.dim, indices)
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

