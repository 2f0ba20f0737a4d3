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
from fxjacobi.emit import dense_stride, is_dense, rebuilt
from fxjacobi.equations import body_outputs, is_effect
from fxjacobi.graph import Spec, TensorSpec, site_of, spec_of, stamp
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Result, Scanned, Stacked, Step, Table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.distribution import Block, Delayed, Distribution

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
        """Return the position of ``reference`` among the block's operands."""
        return self.operands.setdefault(reference, len(self.operands))


class Drafts:
    """One loop's way into blocks: bodies are drafted last block first, then emitted first block first."""

    def __init__(self, distribution: Distribution) -> None:
        self.loop = distribution.loop
        self.outputs = body_outputs(self.loop.body)
        self.distribution = distribution
        self.bindings = distribution.equations.bindings
        self.position = {node: i for i, node in enumerate(self.loop.body.graph.nodes)}
        self.cyclic = {node for component in distribution.equations.recurrences for node in component.nodes}
        self.drafts = [Draft(block) for block in distribution.blocks]
        self.results = [self._result(result) for result in self.loop.results]
        for draft in reversed(self.drafts):
            self._draft_body(draft)

    # References: where a value of the old body is to be had outside it.

    def _result(self, result: Result) -> Reference:
        node = self.outputs[result.output]
        if isinstance(result, Step):
            return self.at(node, result.step)
        return self.stack(node)

    def at(self, node: fx.Node, step: int) -> Reference:
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
                return self.at(self.outputs[output], step - distance)
        if node in self.distribution.equations.invariant:
            return Hoisted(node)
        reference = At(node, step)
        if binding is None:
            self.drafts[self.distribution.home[node]].exports[reference] = None
        return reference

    def stack(self, node: fx.Node) -> Reference:
        """Ask for ``node`` at all steps."""
        reference = Stack(node)
        behind = self.delayed_elsewhere(node)
        if behind is not None:
            if not self.by_table(behind):
                self.stack(behind.base)
        elif node in self.distribution.home:
            self.drafts[self.distribution.home[node]].exports[reference] = None
        return reference

    # Bodies.

    def _draft_body(self, draft: Draft) -> None:
        """Build the body of ``draft`` from what is asked of it."""
        roots = [n for n in draft.block.nodes if (n in self.cyclic if draft.block.recurrence else is_effect(n))]
        members, imports = self._closure([*roots, *(reference.node for reference in draft.exports)], draft.block)
        builder = _Body(self, draft)
        carried = {node for node in members if node.op == "placeholder"}
        for node in sorted(imports | carried, key=self.position.__getitem__):
            behind = self.delayed_elsewhere(node) if node in imports else None
            if node in carried:
                binding = self.bindings[node]
                assert isinstance(binding, Carried)
                builder.carry(node, self.outputs[binding.output], binding.distance, binding.init)
            elif behind is not None and self._passes_through(behind, draft.block):
                # Initial and later values are laid out differently: stacking them would change what kernels see.
                builder.read(behind.base)
                builder.carry(node, behind.base, behind.distance, behind.init)
            else:
                builder.read(node)
        builder.finish(sorted(members - carried, key=self.position.__getitem__))

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

    def delayed_elsewhere(self, node: fx.Node) -> Delayed | None:
        """What a carried placeholder of another block delays, if it is one."""
        return self.distribution.delayed(node) if isinstance(self.bindings.get(node), Carried) else None

    def _passes_through(self, behind: Delayed, block: Block) -> bool:
        return not (behind.uniform or self.distribution.is_few(block) or self.by_table(behind))

    def by_table(self, behind: Delayed) -> bool:
        """Whether the delayed value is made of operands only, so that a table of them names it at each step."""
        return (
            behind.distance >= self.loop.trip_count
            or behind.base in self.distribution.equations.invariant
            or isinstance(self.bindings.get(behind.base), Table)
        )


class _Body:
    """The body of one block, under construction."""

    def __init__(self, drafts: Drafts, draft: Draft) -> None:
        self.drafts, self.draft = drafts, draft
        self.graph = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.relaid: list[fx.Node] = []
        self.carries: dict[int, tuple[fx.Node, int, tuple[int, ...]]] = {}

    def _placeholder(self, node: fx.Node, spec: Spec, binding: Binding) -> None:
        self.draft.bindings.append(binding)
        self.env[node] = stamp(self.graph.placeholder(node.name), spec, site_of(node))

    def carry(self, node: fx.Node, producer: fx.Node, distance: int, init: tuple[int, ...]) -> None:
        """Add ``node`` as the value that ``producer`` had ``distance`` steps before."""
        operands = tuple(self.draft.operand(Operand(i)) for i in init)
        self.carries[len(self.draft.bindings)] = producer, distance, operands
        self._placeholder(node, spec_of(node), Carried(-1, distance, operands))

    def read(self, node: fx.Node) -> None:
        """Add ``node``, a value from outside the block, with its binding."""
        if node in self.env:
            return
        drafts, draft, spec = self.drafts, self.draft, spec_of(node)
        distribution, steps, binding = drafts.distribution, draft.block.steps, drafts.bindings.get(node)
        behind = drafts.delayed_elsewhere(node)
        new: Binding
        if node in distribution.equations.invariant:
            new = Invariant(draft.operand(drafts.at(node, 0)))
        elif isinstance(binding, Literal):
            new = Literal(tuple(binding.values[t] for t in steps))
        elif isinstance(binding, Scanned):
            every = len(steps) == drafts.loop.trip_count
            indices = binding.indices if every else tuple(binding.indices[t] for t in steps)
            new = Scanned(draft.operand(Operand(binding.operand)), binding.dim, indices)
        elif (
            isinstance(binding, Table)
            or distribution.is_few(draft.block)
            or (behind is not None and drafts.by_table(behind))
        ):
            new = Table(tuple(draft.operand(drafts.at(node, t)) for t in steps))
        else:
            new = Scanned(draft.operand(drafts.stack(node)), 0, range(drafts.loop.trip_count), owned=True)
            assert isinstance(spec, TensorSpec)
            if not is_dense(spec):
                self.relaid.append(node)
                spec = TensorSpec(spec.shape, spec.dtype, spec.device, dense_stride(spec.shape))
        self._placeholder(node, spec, new)

    def finish(self, members: Sequence[fx.Node]) -> None:
        """Add what the block computes and what it hands out."""
        draft = self.draft
        for node in self.relaid:
            spec = spec_of(node)
            assert isinstance(spec, TensorSpec)
            relaid = self.graph.call_function(ops.restride, (self.env[node], spec.stride))
            self.env[node] = stamp(relaid, spec, site_of(node))
        for node in members:
            self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
        produced: dict[fx.Node, int] = {}
        for slot, (producer, distance, init) in self.carries.items():
            draft.bindings[slot] = Carried(produced.setdefault(producer, len(produced)), distance, init)
        for reference in draft.exports:
            output = produced.setdefault(reference.node, len(produced))
            if isinstance(reference, Stack):
                draft.results.append(Stacked(output))
            else:
                draft.results.append(Step(output, draft.block.steps.index(reference.step)))
        self.graph.output(tuple(self.env[node] for node in produced))
        draft.body = rebuilt(self.drafts.loop.body, self.graph, {})
