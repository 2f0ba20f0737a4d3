"""The body graph of one loop, built from one of its iterations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from torch import fx

from fxjacobi.assemble import assemble
from fxjacobi.graph import Site, Spec, site_of, spec_of, stamp
from fxjacobi.layouts import selected
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Scanned, Table
from fxjacobi.repeats import Column, Dataflow, Fixed, Repeat, Same
from fxjacobi.tape import literal_key, rebuild

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxjacobi.tape import Tape

__all__ = ["LoopBody", "Operand"]

Operand: TypeAlias = int | tuple[int, int]
"""A tape reference, or the stacked values of ``(loop, position)``."""


class LoopBody:
    """Builds a body from a repeat's last iteration, with the bindings of its placeholders and the loop's operands.

    Args:
        module: Where the graph's submodules are.
        tape: The graph.
        repeat: The loop.
        flow: Its dataflow.
        stacked: Says of which other loop's stacked values a table consists, and of which steps, if any.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        tape: Tape,
        repeat: Repeat,
        flow: Dataflow,
        stacked: Callable[[tuple[int, ...]], tuple[tuple[int, int], Sequence[int]] | None],
    ) -> None:
        self.module = module
        self.tape = tape
        self.flow = flow
        self.stacked = stacked
        self.last = repeat.stop - repeat.period
        self.bindings: list[Binding] = []
        self.operands: dict[Operand, int] = {}
        self.outputs: dict[int, int] = {}
        self.graph = fx.Graph()
        self.placeholders: dict[Any, fx.Node] = {}
        self.nodes: dict[int, fx.Node] = {}
        positions = [position for position in range(repeat.period) if position not in flow.sliced]
        origin = int(tape.first[repeat.start])
        spans = {
            position: range(
                int(tape.first[repeat.start + position]) - origin, int(tape.first[repeat.start + position + 1]) - origin
            )
            for position in positions
        }
        bound: dict[int, fx.Node] = {}
        for position in positions:
            site = site_of(tape.nodes[self.last + position])
            for slot in spans[position]:
                column = flow.columns[slot]
                if not isinstance(column, (Same, Fixed)):
                    bound[slot] = self.bind(column, site)
        for position in positions:
            self.nodes[position] = self.copy(position, iter(spans[position]), bound)

    def copy(self, position: int, slots: Any, bound: dict[int, fx.Node]) -> fx.Node:
        """Copy the node at ``position`` of the iteration into the body."""
        node = self.tape.nodes[self.last + position]

        def leaf(_: Any) -> Any:
            slot = next(slots)
            column = self.flow.columns[slot]
            if isinstance(column, Same):
                return self.nodes[column.position]
            return column.value if isinstance(column, Fixed) else bound[slot]

        args = tuple(rebuild(item, leaf) for item in node.args)
        kwargs = rebuild(dict(node.kwargs), leaf)
        copy = self.graph.create_node(node.op, node.target, args, kwargs)
        copy.meta = dict(node.meta)
        return copy

    def operand(self, key: Operand) -> int:
        """The number of an operand."""
        return self.operands.setdefault(key, len(self.operands))

    def output(self, position: int) -> int:
        """The number of the body's output that is the value at ``position``."""
        return self.outputs.setdefault(position, len(self.outputs))

    def bind(self, column: Column, site: Site | None) -> fx.Node:
        """The placeholder of what a slot holds; equal bindings share one."""
        key: Any = column
        if isinstance(column, Literal):
            key = (Literal, *map(literal_key, column.values))
        elif isinstance(column, Scanned):
            key = (Scanned, column.operand, column.dim, tuple(column.indices))
        found = self.placeholders.get(key)
        if found is not None:
            return found
        binding: Binding
        spec: Spec = None
        match column:
            case Carried(position, distance, init):
                source = self.tape.nodes[self.last + position]
                name, spec = f"{source.name}_before", spec_of(source)
                binding = Carried(self.output(position), distance, tuple(map(self.operand, init)))
                if position in self.flow.sliced:  # a slice of the step before that the first steps do not have
                    part = self.flow.sliced[position]
                    self.nodes[position] = self.bind(Scanned(part.base, part.dim, part.indices), site)
            case Scanned(base, dim, indices):
                source = self.tape.node(base)
                name, spec = f"{source.name}_step", selected(spec_of(source), dim)
                binding = Scanned(self.operand(base), dim, indices)
            case Table(references):
                source = self.tape.node(references[-1])
                name, spec = f"{source.name}_each", spec_of(source)
                through = self.stacked(references)
                if through is None:
                    binding = Table(tuple(map(self.operand, references)))
                else:
                    binding = Scanned(self.operand(through[0]), 0, through[1], owned=True)
            case Invariant(reference):
                source = self.tape.node(reference)
                name, spec = source.name, spec_of(source)
                binding = Invariant(self.operand(reference))
            case Literal(values):
                name = "index" if isinstance(values[0], int) else "literal"
                binding = column
            case _:
                raise AssertionError(column)
        node = stamp(self.graph.placeholder(name), spec, site)
        node.target = node.name  # of two placeholders with one name the second's was made unique
        self.placeholders[key] = node
        self.bindings.append(binding)
        return node

    def finish(self) -> fx.GraphModule:
        """Close the graph with the outputs that were asked for."""
        self.graph.output(tuple(self.nodes[position] for position in self.outputs))
        return assemble(self.graph, self.module)
