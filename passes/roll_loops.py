"""Roll the unrolled loops of a recorded run back into loops."""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from fxjacobi.assemble import assemble, copy_node
from fxjacobi.graph import TensorSpec, site_of, spec_of, stamp
from fxjacobi.inline_calls import inline_calls
from fxjacobi.layouts import dense, is_contiguous
from fxjacobi.loops import Loop, Result, Stacked, Step
from fxjacobi.passes.base import Pass, PassResult
from fxjacobi.passes.eliminate import eliminate
from fxjacobi.passes.loop_body import LoopBody
from fxjacobi.repeats import Repeat, classify, find_repeats, indices_of
from fxjacobi.tape import NOT_A_SELECT, Tape, rebuild, tabulate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fxjacobi.graph import Site, Spec
    from fxjacobi.tape import Integers

__all__ = ["RollLoops", "roll_loops"]

_aten = torch.ops.aten
_FEW = 4
"""So many steps' values may be results of their own; more are selected from the stacked result."""


@dataclass(frozen=True)
class RollLoops(Pass):
    """Roll tandem repeats of the graph into :class:`~fxjacobi.loops.Loop` calls, loops within loops included.

    Fires on at least ``minimum_trips`` equal iterations of at least ``minimum_nodes`` nodes in all whose dataflow is
    a loop's (:mod:`fxjacobi.repeats`); iterations that differ stay straight code before and after. Must not fire on
    random draws, and does not on code that only moves data. Recorded submodules called in a loop body, or from one
    place only, are inlined unless ``inline`` is false. Before and after, for ``h = f(h, x[:, t])``::

        x_0 = select(x, 1, 0); h_1 = f(h_0, x_0); x_1 = select(x, 1, 1); h_2 = f(h_1, x_1); ...; stack([h_1, h_2, ...])
        loop_0 = Loop(f, T, [Carried(0, 1, (h_0,)), Scanned(x, 1, range(T))], [Stacked(0)])(h_0, x)

    The rolling is that of *loop rerolling* in compilers; the loops' equations are arXiv 2002.03629, section 3.
    """

    name = "roll_loops"
    minimum_trips: int = 3
    minimum_nodes: int = 8
    inline: bool = True

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Roll, from the outermost loops inwards."""
        rolled = roll_loops(
            module, minimum_trips=self.minimum_trips, minimum_nodes=self.minimum_nodes, inline=self.inline
        )
        if rolled is module:
            return PassResult(module, False)
        return PassResult(eliminate(rolled, keep_iterations=False), True)


def roll_loops(
    module: fx.GraphModule,
    *,
    minimum_trips: int = 3,
    minimum_nodes: int = 8,
    inline: bool = True,
    is_body: bool = False,
) -> fx.GraphModule:
    """Return ``module`` with its repeats rolled (see :class:`RollLoops`), or ``module`` itself if it has none."""

    def roll_body(body: fx.GraphModule) -> fx.GraphModule:
        return roll_loops(body, minimum_trips=minimum_trips, minimum_nodes=minimum_nodes, inline=inline, is_body=True)

    while True:
        tape = tabulate(module)
        repeats = find_repeats(tape, minimum_trips=minimum_trips, minimum_nodes=minimum_nodes)
        if repeats:
            roller = _Roller(module, tape, repeats)
            module = roller.run(roll_body)
        # A submodule is inlined only after the level that calls it is rolled: equal calls are one label each.
        inlined = inline_calls(module, only_single=not is_body) if inline else module
        if inlined is module:
            return module
        module = inlined


@dataclass(frozen=True, slots=True)
class _Run:
    """All values of one position of a loop, in order (or the reverse), in an argument list."""

    loop: int
    position: int
    reverse: bool


@dataclass(slots=True)
class _Rolled:
    """A loop being emitted: its node, and where its results are (``step`` is ``None`` for all steps stacked)."""

    node: fx.Node
    result: dict[tuple[int, int | None], int]


class _Roller:
    """Emits the graph of ``module`` with the given repeats as loops."""

    def __init__(self, module: fx.GraphModule, tape: Tape, repeats: tuple[Repeat, ...]) -> None:
        self.module = module
        self.tape = tape
        self.repeats = repeats
        self.flows = [classify(tape, repeat) for repeat in repeats]
        self.which = np.full(len(tape.nodes) + 1, -1, dtype=np.int64)
        for number, repeat in enumerate(repeats):
            self.which[repeat.start : repeat.stop] = number
        self.graph = fx.Graph()
        self.values: dict[int, fx.Node] = {}
        self.rolled: list[_Rolled] = []
        self.loops: dict[str, nn.Module] = {}
        self.names = {str(node.target) for node in tape.nodes if node.op == "call_module"}
        self.joins: dict[int, list[_Run | int]] = {}
        self.steps: dict[tuple[int, int], set[int]] = defaultdict(set)
        self.stacked: set[tuple[int, int]] = set()
        self.find_uses()

    # Which values of the loops are used outside them

    def find_uses(self) -> None:
        """Fill ``joins``, ``steps`` and ``stacked``."""
        tape = self.tape
        outside = tape.literal | (tape.values < 0)
        inside = np.where(outside, -1, self.which[np.where(outside, 0, tape.values)])
        slots = np.flatnonzero((inside >= 0) & (inside != self.which[tape.owner]))
        owners = tape.owner[slots]
        joined: set[int] = set()
        for owner in np.unique(owners[self.which[owners] < 0]).tolist():
            if tape.nodes[owner].target in (_aten.stack.default, _aten.cat.default):
                joined.update(self.find_runs(owner))
        for slot in slots.tolist():
            if slot not in joined:
                loop, position, step = self.locate(int(tape.values[slot]))
                if position not in self.flows[loop].sliced:
                    self.steps[loop, position].add(step)
        for (loop, position), steps in self.steps.items():
            if len(steps) > _FEW and all(is_contiguous(self.spec_at(loop, position, step)) for step in steps):
                self.stacked.add((loop, position))

    def find_runs(self, owner: int) -> Iterator[int]:
        """Note the complete runs of loop values that a ``stack`` or ``cat`` joins; yield their slots."""
        tape = self.tape
        node = tape.nodes[owner]
        begin = int(tape.first[owner])
        items = tape.values[begin : begin + len(node.args[0])]  # type: ignore[arg-type]
        if not is_contiguous(spec_of(node)):
            return
        pieces: list[_Run | int] = []
        slots: list[int] = []
        at = 0
        while at < len(items):
            run = self.run_at(items, at)
            pieces.append(int(items[at]) if run is None else run)
            length = 1 if run is None else self.repeats[run.loop].trips
            if run is not None:
                self.stacked.add((run.loop, run.position))
                slots.extend(range(begin + at, begin + at + length))
            at += length
        if slots:
            self.joins[owner] = pieces
        yield from slots

    def run_at(self, items: Integers, at: int) -> _Run | None:
        """The complete run of loop values that starts at ``items[at]``."""
        if items[at] < 0 or self.which[items[at]] < 0:
            return None
        loop, position, step = self.locate(int(items[at]))
        repeat = self.repeats[loop]
        if step not in (0, repeat.trips - 1) or position in self.flows[loop].sliced:
            return None
        wanted = repeat.start + position + repeat.period * np.arange(repeat.trips)
        wanted = wanted if step == 0 else wanted[::-1]
        return _Run(loop, position, step != 0) if np.array_equal(items[at : at + repeat.trips], wanted) else None

    def locate(self, reference: int) -> tuple[int, int, int]:
        """The loop, position and step of a value."""
        loop = int(self.which[reference])
        step, position = divmod(reference - self.repeats[loop].start, self.repeats[loop].period)
        return loop, position, step

    def spec_at(self, loop: int, position: int, step: int) -> Spec:
        """The spec of a loop's value."""
        repeat = self.repeats[loop]
        return spec_of(self.tape.nodes[repeat.start + position + step * repeat.period])

    def stacked_table(self, references: tuple[int, ...]) -> tuple[tuple[int, int], Sequence[int]] | None:
        """The loop and position whose stacked values ``references`` are taken from, and the steps, if so."""
        array = np.asarray(references, dtype=np.int64)
        if array.min() < 0 or self.which[array[0]] < 0 or (self.which[array] != self.which[array[0]]).any():
            return None
        loop, position, _ = self.locate(references[0])
        steps, positions = np.divmod(array - self.repeats[loop].start, self.repeats[loop].period)
        if (loop, position) not in self.stacked or position in self.flows[loop].sliced or (positions != position).any():
            return None
        used = self.steps[loop, position]
        if not all(is_contiguous(self.spec_at(loop, position, step)) for step in used):
            return None
        return (loop, position), indices_of(steps)

    # The new graph

    def run(self, roll_body: Callable[[fx.GraphModule], fx.GraphModule]) -> fx.GraphModule:
        """Emit leaves, straight code and loops in order."""
        tape = self.tape
        for op in ("placeholder", "get_attr"):
            for index, leaf in enumerate(tape.leaves):
                if leaf.op == op:
                    self.values[-1 - index] = self.graph.node_copy(leaf)
        at = 0
        while at < len(tape.nodes):
            loop = int(self.which[at])
            if loop >= 0:
                self.emit_loop(loop, roll_body)
                at = self.repeats[loop].stop
                continue
            if tape.select_base[at] == NOT_A_SELECT:  # selects are emitted where they are still used
                self.values[at] = self.emit_straight(at)
            at += 1
        return assemble(self.graph, self.module, self.loops)

    def emit(self, target: Any, args: tuple[Any, ...], spec: Spec, site: Site | None, **kwargs: Any) -> fx.Node:
        """Append one operation."""
        return stamp(self.graph.call_function(target, args, kwargs), spec, site)

    def emit_straight(self, at: int) -> fx.Node:
        """Copy a node outside the loops."""
        tape = self.tape
        node = tape.nodes[at]
        if at in self.joins:
            return self.emit_join(at)
        references = iter(tape.values[tape.first[at] : tape.first[at + 1]].tolist())

        def leaf(value: Any) -> Any:
            reference = next(references)
            return self.value(reference) if isinstance(value, fx.Node) else value

        args = tuple(rebuild(item, leaf) for item in node.args)
        kwargs = rebuild(dict(node.kwargs), leaf)
        return copy_node(self.graph, node, args, kwargs)

    def value(self, reference: int) -> fx.Node:
        """The node in the new graph of a value of the old one."""
        found = self.values.get(reference)
        if found is not None:
            return found
        tape = self.tape
        node = tape.nodes[reference]
        loop = int(self.which[reference])
        if loop >= 0:
            _, position, step = self.locate(reference)
            if position not in self.flows[loop].sliced:
                rolled = self.rolled[loop]
                if (position, step) in rolled.result:
                    made = self.emit_result(loop, position, step)
                else:
                    # The row is copied: the unrolled program's value lies in memory of its own, aligned.
                    args = (self.emit_result(loop, position, None), 0, step)
                    row = self.emit(_aten.select.int, args, spec_of(node), site_of(node))
                    made = self.emit(_aten.clone.default, (row,), spec_of(node), site_of(node))
                self.values[reference] = made
                return made
        base, dim, index = (int(a[reference]) for a in (tape.select_base, tape.select_dim, tape.select_index))
        self.values[reference] = made = self.emit(
            _aten.select.int, (self.value(base), dim, index), spec_of(node), site_of(node)
        )
        return made

    def emit_result(self, loop: int, position: int, step: int | None) -> fx.Node:
        """The ``getitem`` of a loop's result, which every use shares."""
        rolled = self.rolled[loop]
        index = rolled.result[position, step]
        for user in rolled.node.users:
            if user.args[1] == index:
                return user
        with self.graph.inserting_after(rolled.node):
            node = self.graph.call_function(operator.getitem, (rolled.node, index))
        return stamp(node, spec_of(rolled.node)[index], site_of(rolled.node))  # type: ignore[index]

    def emit_join(self, at: int) -> fx.Node:
        """A ``stack`` or ``cat`` of complete runs: of the loops' stacked results instead."""
        node = self.tape.nodes[at]
        spec, site = spec_of(node), site_of(node)
        assert isinstance(spec, TensorSpec)
        rank = len(spec.shape)
        dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % rank  # type: ignore[arg-type]
        stack = node.target is _aten.stack.default
        parts: list[fx.Node] = []
        for piece in self.joins[at]:
            if isinstance(piece, _Run):
                parts.append(self.emit_run(piece, dim, site, stack=stack))
            elif stack:
                value = self.value(piece)
                shape = (*spec.shape[:dim], 1, *spec.shape[dim + 1 :])
                made = self.emit(_aten.unsqueeze.default, (value, dim), dense(spec, shape), site)
                parts.append(made)
            else:
                parts.append(self.value(piece))
        return parts[0] if len(parts) == 1 else self.emit(_aten.cat.default, (parts, dim), spec, site)

    def emit_run(self, run: _Run, dim: int, site: Site | None, *, stack: bool) -> fx.Node:
        """The stacked values ``(T, ...)`` of a loop as ``stack(values, dim)`` or ``cat(values, dim)``, contiguous."""
        made = self.emit_result(run.loop, run.position, None)
        spec = spec_of(made)
        assert isinstance(spec, TensorSpec)
        if run.reverse:
            made = self.emit(_aten.flip.default, (made, [0]), spec, site)
        shape = spec.shape
        if dim:
            order = [*range(1, dim + 1), 0, *range(dim + 1, len(shape))]
            moved = dense(spec, tuple(shape[i] for i in order), tuple(spec.stride[i] for i in order))
            made = self.emit(_aten.permute.default, (made, order), moved, site)
            shape = moved.shape
            made = self.emit(
                _aten.clone.default, (made,), dense(spec, shape), site, memory_format=torch.contiguous_format
            )
        if not stack:
            shape = (*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :])
            made = self.emit(_aten.view.default, (made, list(shape)), dense(spec, shape), site)
        return made

    def emit_loop(self, number: int, roll_body: Callable[[fx.GraphModule], fx.GraphModule]) -> None:
        """Append the loop's call; its results are unpacked when they are used."""
        repeat = self.repeats[number]
        body = LoopBody(self.module, self.tape, repeat, self.flows[number], self.stacked_table)
        results: list[Result] = []
        specs: list[Spec] = []
        found: dict[tuple[int, int | None], int] = {}

        def result(position: int, step: int | None) -> None:
            found[position, step] = len(results)
            output = body.output(position)
            spec = self.spec_at(number, position, 0 if step is None else step)
            if step is not None:
                results.append(Step(output, step))
            else:
                assert isinstance(spec, TensorSpec)
                results.append(Stacked(output))
                spec = dense(spec, (repeat.trips, *spec.shape))
            specs.append(spec)

        for position in sorted({at for loop, at in {*self.steps, *self.stacked} if loop == number}):
            steps = self.steps.get((number, position), set())
            stacked = (number, position) in self.stacked
            if stacked:
                result(position, None)
            contiguous = all(is_contiguous(self.spec_at(number, position, step)) for step in steps)
            if not (stacked and contiguous and len(steps) > _FEW):
                for step in sorted(steps):
                    result(position, step)
        loop = Loop(roll_body(body.finish()), repeat.trips, body.bindings, results)
        name = next(name for name in map("loop_{}".format, itertools.count(number)) if name not in self.names)
        self.names.add(name)
        self.loops[name] = loop
        operands = tuple(
            self.emit_result(key[0], key[1], None) if isinstance(key, tuple) else self.value(key)
            for key in body.operands
        )
        node = stamp(
            self.graph.create_node("call_module", name, operands, name=name),
            tuple(specs),
            site_of(self.tape.nodes[repeat.start]),
        )
        self.rolled.append(_Rolled(node, found))
