"""Chunks of a loop's steps that run side by side, a row each: row ``c`` of inner step ``j`` is step ``rows[c] + j``.

    row c:    [ warm-up ][ its chunk of L steps ]
    row c+1:              [ warm-up ][ its chunk  ]        rows are L steps apart, so their inputs are a view

A row's warm-up runs the last steps of the chunk before, from a guess; the first row is right from its first step on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fxjacobi.batched_body import Layout, Strategy
from fxjacobi.constants import positions
from fxjacobi.lanes import lanes_of, run_lanes
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked
from fxjacobi.scripted_loop import scripted_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from fxjacobi.system import States, System

__all__ = ["Chunks", "Heads", "Lane", "Swept", "heads_of", "prepared", "run_chunks", "with_heads"]

_T = TypeVar("_T")

Heads = tuple[torch.Tensor, ...]
"""What rows or chunks read from before themselves: one tensor (rows, *shape) for each carry and step below its distance."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Some of the rows, which one core runs, laid out for a lean inner loop.

    Args:
        rows: Which of the active ones.
        layout: How one inner step of these is evaluated.
        columns: For each placeholder of the body what it reads: ``(length, ...)`` packed, the value itself where it is
            the same throughout, a list where it is a Python value of the step, ``None`` where it is carried.
        apart: The columns that are (length, chunks, batch, ...): folded one step at a time, not all at once.
        inner: The inner steps as a loop of their own, where the layout has a graph.
    """

    rows: range
    layout: Layout
    columns: tuple[Any, ...]
    apart: frozenset[int]
    inner: Loop | None


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks still being iterated.

    Args:
        starts: First steps of all chunks, ascending.
        length: Steps of each chunk; the first also holds what the other rows warm up.
        warm_up: Steps that each row but the first runs before its chunk.
        first: First chunk still iterated.
        heads: What the rows read from before themselves, of those still iterated.
        lanes: The rows still iterated, in order, by the core that runs them.
        samples: The samples of the batch still iterated, where some have settled; ``None``: all. ``heads`` hold all.
        cores: How many may share the rows.
    """

    starts: tuple[int, ...]
    length: int
    warm_up: int
    first: int
    heads: Heads
    lanes: tuple[Lane, ...]
    samples: torch.Tensor | None = None
    cores: int = 1

    @property
    def rows(self) -> tuple[int, ...]:
        """The first steps of the rows still iterated."""
        return tuple([max(0, start - self.warm_up) for start in self.starts[self.first :]])

    @property
    def steps(self) -> int:
        """The inner steps of a row."""
        return self.warm_up + self.length


@dataclass(frozen=True, slots=True)
class Swept:
    """What the rows came to.

    Args:
        states: The state's components from the first step of the first chunk still iterated on, (steps, *shape), of the
            samples still iterated.
        others: The other outputs that are results, likewise.
        heads: What each chunk read from before itself, of the samples still iterated: with a warm-up, its own end.
    """

    states: States
    others: States
    heads: Heads


def with_heads(chunks: Chunks, heads: Heads) -> Chunks:
    """Return ``chunks`` with other values before them."""
    return replace(chunks, heads=heads)


def prepared(
    system: System,
    states: States,
    starts: tuple[int, ...],
    length: int,
    first: int = 0,
    *,
    warm_up: int = 0,
    samples: torch.Tensor | None = None,
    cores: int = 1,
) -> Chunks:
    """Gather the inputs of the chunks from ``first`` on, and their heads from a trajectory."""
    rows = tuple([max(0, start - warm_up) for start in starts[first:]])
    heads = heads_of(system, states, rows)
    one = system.batch is not system.body or heads[0].device.type != "cpu"
    lanes = [
        _lane(system, rows, some, warm_up + length, samples, heads)
        for some in ([range(len(rows))] if one else lanes_of(len(rows), cores))
    ]
    return Chunks(starts, length, warm_up, first, heads, tuple(lanes), samples, cores)


def _lane(
    system: System,
    active: tuple[int, ...],
    rows: range,
    length: int,
    samples: torch.Tensor | None,
    heads: Heads,
) -> Lane:
    starts = active[rows.start : rows.stop]
    whole = system.fixed(slice(None))
    bindings = system.loop.bindings
    own = system.batch is system.body
    columns: list[Any] = []
    for value, binding in zip(whole, bindings, strict=True):
        plain = value is None or isinstance(binding, (Invariant, Literal))
        columns.append(value if plain else _columns(value, starts, length, view=own))
    if own:

        def example() -> list[Any]:
            arguments = list(whole)
            for index, binding in enumerate(bindings):
                if isinstance(binding, Literal):
                    arguments[index] = [binding.values[s] for s in starts]
                elif system.body.mapped[index] and whole[index] is not None:
                    arguments[index] = columns[index][0]
            position = 0
            for carry in system.carries:
                arguments[carry.placeholder] = heads[position][rows.start : rows.stop]
                position += carry.depth
            return arguments

        layout = system.body.known(len(rows)) or system.body.layout(example(), len(rows))
        graph = layout.body if layout.body is not None else layout.graph(system.body.prepare(layout, example()))
    else:
        batch = system.batch
        lifted = (False,) * len(whole)
        run = lambda *arguments: batch(arguments, len(rows))  # noqa: E731 - a field, not a function of this module
        layout, graph = Layout(Strategy.EACH, len(rows), run, lifted, heads[0].device), None
    apart: dict[int, tuple[int, ...]] = {}
    for index, (binding, column) in enumerate(zip(bindings, columns, strict=True)):
        if isinstance(binding, Literal):
            literals = [layout.literal(index, [column[s + j] for s in starts]) for j in range(length)]
            columns[index] = torch.stack(literals) if isinstance(literals[0], torch.Tensor) else literals
        elif column is not None and not isinstance(binding, Invariant):
            column = column if samples is None else column.index_select(2, samples)
            if layout.apart(column, leading=1):
                # Folded all at once, the inputs would be copied: a pass over memory that takes as long as many steps.
                apart[index], columns[index] = (column.shape[1] * column.shape[2], *column.shape[3:]), column
            else:
                columns[index] = layout.pack(column, leading=1)
    if graph is not None and apart:
        graph = layout.folding(graph, tuple(apart.items()))
    inner = None if graph is None else _inner(system, layout, graph, columns, length)
    return Lane(rows, layout, tuple(columns), frozenset(apart), inner)


def _columns(value: torch.Tensor, starts: tuple[int, ...], length: int, *, view: bool) -> torch.Tensor:
    """Return ``value[start + j]`` for each ``j < length`` and start, (length, starts, ...).

    A view where the starts are evenly apart: a copy of the inputs costs as much as several of the steps. Bits may
    depend on how operands lie in memory, so no ``view`` where they count.
    """
    apart = starts[1] - starts[0] if len(starts) > 1 else length
    if view and starts == tuple(range(starts[0], starts[0] + apart * len(starts), apart)):
        step, rest = value.stride(0), value.stride()[1:]
        shape = (length, len(starts), *value.shape[1:])
        return value.as_strided(shape, (step, apart * step, *rest), value.storage_offset() + starts[0] * step)
    steps = tuple([start + j for j in range(length) for start in starts])
    return value.index_select(0, positions(steps, value.device)).reshape(length, len(starts), *value.shape[1:])


def heads_of(system: System, states: States, starts: tuple[int, ...]) -> Heads:
    """Return what each carry reads at steps ``start + j``, ``j < distance``, for each start."""
    return tuple(
        carry.at(states, [start + inner for start in starts])
        for carry in system.carries
        for inner in range(carry.depth)
    )


def run_chunks(system: System, chunks: Chunks) -> Swept:
    """Run all active rows from their heads."""
    outputs = (*system.components, *system.others)
    # Rows first where a step has them: what comes out is then in the order of the trajectory.
    dim = 0 if chunks.lanes[0].layout.strategy is Strategy.SINGLE else 1
    heads: list[Heads] = [()] * len(chunks.lanes)
    rooms: list[torch.Tensor] = []
    begin = chunks.starts[chunks.first]
    if chunks.warm_up or len(chunks.lanes) > 1:
        samples = None if chunks.samples is None else len(chunks.samples)
        rooms = [_room(system.body.output_specs[o], system.steps - begin, samples) for o in outputs]

    def run(place: int) -> list[torch.Tensor]:
        lane = chunks.lanes[place]
        packed = _packed(chunks, lane)
        steps = scripted_steps(lane.inner, dim=dim) if lane.inner is not None else None
        if steps is None:
            found = _in_python(system, chunks.steps, lane, packed)
            values = [lane.layout.unpack(value, leading=1).transpose(0, 1) for value in found]
        else:
            values = [_by_chunk(lane.layout, value) for value in steps(packed)]
        heads[place] = _used(system, chunks, lane, values)
        if not rooms:
            return [value.flatten(0, 1) for value in values]
        for room, value in zip(rooms, values, strict=True):
            _place(room, value, chunks, lane.rows)
        return rooms

    values = _each_lane(chunks, dim, [partial(run, place) for place in range(len(chunks.lanes))])[0]
    count = len(system.components)
    whole = heads[0] if len(heads) == 1 else tuple(torch.cat(column) for column in zip(*heads, strict=True))
    return Swept(tuple(values[:count]), tuple(values[count:]), whole)


def _room(spec: Any, steps: int, samples: int | None) -> torch.Tensor:
    shape = spec.shape if samples is None else (samples, *spec.shape[1:])
    return torch.empty((steps, *shape), dtype=spec.dtype, device=spec.device)


def _place(room: torch.Tensor, value: torch.Tensor, chunks: Chunks, rows: range) -> None:
    """Write what some rows came to, (rows, steps, *shape), to the steps that are their chunks'."""
    skipped, length = chunks.warm_up, chunks.length
    first = 0
    if rows.start == 0:  # its warm-up is no guess, but the loop's own first steps
        room[: skipped + length] = value[0]
        first = 1
    begin, end = skipped + (rows.start + first) * length, skipped + rows.stop * length
    room[begin:end].unflatten(0, (len(rows) - first, length)).copy_(value[first:, skipped:])


def _used(system: System, chunks: Chunks, lane: Lane, values: list[torch.Tensor]) -> Heads:
    """Return what the chunks of a lane read from before themselves; ``values`` are their rows', (rows, steps, *shape)."""
    given = _some_heads(chunks, lane)
    if not chunks.warm_up:
        return given
    used: list[torch.Tensor] = []
    for carry in system.carries:
        own = given[len(used) : len(used) + carry.depth]
        for inner in range(carry.depth):
            at = chunks.warm_up + inner - carry.distance
            found = values[carry.component][:, at] if at >= 0 else own[chunks.warm_up + inner]
            if lane.rows.start == 0:
                found = torch.cat([own[inner][:1], found[1:]])
            used.append(found)
    return tuple(used)


def _each_lane(chunks: Chunks, dim: int, calls: list[Callable[[], _T]]) -> list[_T]:
    """Return what the lanes' calls give, side by side where none of them holds Python's lock."""
    scripts = [lane.inner is not None and scripted_steps(lane.inner, dim=dim) is not None for lane in chunks.lanes]
    return run_lanes(calls) if all(scripts) else [call() for call in calls]


def _some_heads(chunks: Chunks, lane: Lane) -> Heads:
    some = chunks.samples
    heads = [head[lane.rows.start : lane.rows.stop] for head in chunks.heads]
    return tuple(heads if some is None else [head.index_select(1, some) for head in heads])


def _packed(chunks: Chunks, lane: Lane) -> list[torch.Tensor]:
    """Return the operands of the lane's inner loop: its columns that are tensors, and the heads of its rows."""
    heads = _some_heads(chunks, lane)
    return [*(c for c in lane.columns if isinstance(c, torch.Tensor)), *map(lane.layout.pack, heads)]


def _by_chunk(layout: Layout, value: torch.Tensor) -> torch.Tensor:
    """Return what scripted steps stacked, (rows * batch, length, ...) where rows are folded, as (rows, length, ...)."""
    if layout.strategy is Strategy.SINGLE:
        return value.unsqueeze(0)
    return layout.unpack(value).transpose(1, 2) if layout.strategy is Strategy.FOLD else value


def _inner(system: System, layout: Layout, graph: fx.GraphModule, columns: list[Any], length: int) -> Loop:
    """The inner steps as a loop: operands are the columns that are tensors, then the packed heads."""
    operands = {i: at for at, i in enumerate(i for i, c in enumerate(columns) if isinstance(c, torch.Tensor))}
    head_at: dict[int, int] = {}
    position = len(operands)
    for carry in system.carries:
        head_at[carry.placeholder] = position
        position += carry.depth
    bindings: list[Any] = []
    for index, (binding, column) in enumerate(zip(system.loop.bindings, columns, strict=True)):
        if isinstance(binding, Carried):
            depth = min(binding.distance, system.steps)
            init = tuple(range(head_at[index], head_at[index] + depth))
            bindings.append(Carried(binding.output, binding.distance, init))
        elif isinstance(binding, Invariant):
            bindings.append(Invariant(operands[index]) if index in operands else Literal((column,) * length))
        elif index in operands:
            bindings.append(Scanned(operands[index], 0, range(length)))
        elif layout.strategy is not Strategy.VMAP:  # traced under vmap, it is a constant of the graph
            bindings.append(Literal(tuple(column)))
    results = tuple(Stacked(output) for output in (*system.components, *system.others))
    return layout.loop(graph, length, tuple(bindings), results)


def _in_python(system: System, length: int, lane: Lane, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    outputs = (*system.components, *system.others)
    histories: dict[int, list[torch.Tensor]] = {output: [] for output in outputs}
    slots: list[tuple[int, int, int, int]] = []
    offset = len(operands) - sum(carry.depth for carry in system.carries)
    for carry in system.carries:
        slots.append((carry.placeholder, system.components[carry.component], carry.distance, offset))
        offset += carry.depth
    varying = [not isinstance(b, (Invariant, Carried)) for b in system.loop.bindings]
    for inner in range(length):
        arguments = [c[inner] if v else c for c, v in zip(lane.columns, varying, strict=True)]
        for index in lane.apart:
            arguments[index] = lane.layout.pack(arguments[index])
        for placeholder, output, distance, first in slots:
            known = inner >= distance
            arguments[placeholder] = histories[output][inner - distance] if known else operands[first + inner]
        found = lane.layout.run(*arguments)
        for output, history in histories.items():
            history.append(found[output])
    return [torch.stack(histories[output]) for output in outputs]
