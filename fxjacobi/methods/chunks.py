"""Chunks of a loop's steps that run side by side: row ``c`` of inner step ``j`` is step ``starts[c] + j`` of the loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fxjacobi.batched_body import Layout, Strategy
from fxjacobi.constants import positions
from fxjacobi.lanes import lanes_of, run_lanes
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked, Step
from fxjacobi.scripted_loop import scripted_steps

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from fxjacobi.system import States, System

__all__ = ["Chunks", "Heads", "Lane", "ends_of", "heads_of", "prepared", "run_chunks", "with_heads"]

_T = TypeVar("_T")

Heads = tuple[torch.Tensor, ...]
"""What the chunks read from before themselves: one tensor (chunks, *shape) for each carry and step below its distance."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Some of the chunks, which one core runs, laid out for a lean inner loop.

    Args:
        rows: Which of the active chunks.
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
        length: Steps of each.
        first: First chunk still iterated.
        heads: See :data:`Heads`; for the chunks still iterated.
        lanes: The chunks still iterated, in order, by the core that runs them.
        tail: How many of the last inner steps count; ``None``: all.
        samples: The samples of the batch still iterated, where some have settled; ``None``: all. ``heads`` hold all.
        cores: How many may share the chunks.
    """

    starts: tuple[int, ...]
    length: int
    first: int
    heads: Heads
    lanes: tuple[Lane, ...]
    tail: int | None = None
    samples: torch.Tensor | None = None
    cores: int = 1


def with_heads(chunks: Chunks, heads: Heads) -> Chunks:
    """Return ``chunks`` with other values before them."""
    return replace(chunks, heads=heads)


def prepared(
    system: System,
    states: States,
    starts: tuple[int, ...],
    length: int,
    first: int,
    samples: torch.Tensor | None = None,
    heads: Heads | None = None,
    tail: int | None = None,
    cores: int = 1,
) -> Chunks:
    """Gather the inputs of the chunks from ``first`` on, and their heads from a trajectory where they are not given."""
    active = starts[first:]
    if heads is None:
        heads = heads_of(system, states, active)
    one = system.batch is not system.body or heads[0].device.type != "cpu"
    lanes = [
        _lane(system, active, rows, length, samples, heads, tail)
        for rows in ([range(len(active))] if one else lanes_of(len(active), cores))
    ]
    return Chunks(starts, length, first, heads, tuple(lanes), tail, samples, cores)


def _lane(
    system: System,
    active: tuple[int, ...],
    rows: range,
    length: int,
    samples: torch.Tensor | None,
    heads: Heads,
    tail: int | None,
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
    inner = None if graph is None else _inner(system, layout, graph, columns, length, tail)
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
    """Return what each carry reads at steps ``start + j``, ``j < distance``, of each chunk."""
    return tuple(
        carry.at(states, [start + inner for start in starts])
        for carry in system.carries
        for inner in range(carry.depth)
    )


def run_chunks(system: System, chunks: Chunks) -> tuple[States, States]:
    """Run all active chunks from their heads.

    Returns:
        The state's components and the other outputs that are results, each ``(chunks, length, *shape)``, of the
        samples still iterated.
    """
    outputs = (*system.components, *system.others)
    # Rows first where a step has them: what comes out is then in the order of the trajectory.
    dim = 0 if chunks.lanes[0].layout.strategy is Strategy.SINGLE else 1

    def run(lane: Lane) -> list[torch.Tensor]:
        packed = _packed(chunks, lane)
        steps = scripted_steps(lane.inner, dim=dim) if lane.inner is not None else None
        if steps is None:
            found = _in_python(system, chunks.length, lane, packed)
            return [lane.layout.unpack(value, leading=1).transpose(0, 1) for value in found]
        return [_by_chunk(lane.layout, value) for value in steps(packed)]

    if len(chunks.lanes) == 1:
        values = run(chunks.lanes[0])
    else:
        rows, specs = len(chunks.heads[0]), [system.body.output_specs[o] for o in outputs]
        samples = None if chunks.samples is None else len(chunks.samples)
        values = [_room(spec, (rows, chunks.length), samples) for spec in specs]

        def fill(lane: Lane) -> None:
            for whole, value in zip(values, run(lane), strict=True):
                whole[lane.rows.start : lane.rows.stop] = value

        _each_lane(chunks, dim, fill)
    count = len(system.components)
    return tuple(values[:count]), tuple(values[count:])


def _room(spec: Any, leading: tuple[int, ...], samples: int | None) -> torch.Tensor:
    shape = spec.shape if samples is None else (samples, *spec.shape[1:])
    return torch.empty((*leading, *shape), dtype=spec.dtype, device=spec.device)


def ends_of(system: System, chunks: Chunks) -> States:
    """Run all active chunks, prepared with a ``tail``, and return the state's components at these last steps.

    Each is ``(chunks, tail, *shape)``.
    """
    tail = chunks.tail
    assert tail is not None, "prepared with a tail"

    def run(lane: Lane) -> list[torch.Tensor]:
        packed = _packed(chunks, lane)
        steps = scripted_steps(lane.inner) if lane.inner is not None else None
        if steps is None:
            every = _in_python(system, chunks.length, lane, packed)[: len(system.components)]
            last = [value[-tail:].unbind(0) for value in every]
        else:
            found = list(steps(packed))
            last = [tuple(found[i : i + tail]) for i in range(0, len(found), tail)]
        return [torch.stack([lane.layout.unpack(v) for v in values], 1) for values in last]

    parts = _each_lane(chunks, 0, run)
    return tuple(parts[0]) if len(parts) == 1 else tuple(torch.cat(values) for values in zip(*parts, strict=True))


def _each_lane(chunks: Chunks, dim: int, run: Callable[[Lane], _T]) -> list[_T]:
    """Return what ``run`` gives for each lane, side by side where no lane holds Python's lock."""
    scripts = [lane.inner is not None and scripted_steps(lane.inner, dim=dim) is not None for lane in chunks.lanes]
    if all(scripts):
        return run_lanes([partial(run, lane) for lane in chunks.lanes])
    return [run(lane) for lane in chunks.lanes]


def _packed(chunks: Chunks, lane: Lane) -> list[torch.Tensor]:
    """Return the operands of the lane's inner loop: its columns that are tensors, and the heads of its chunks."""
    some = chunks.samples
    heads = [head[lane.rows.start : lane.rows.stop] for head in chunks.heads]
    heads = heads if some is None else [head.index_select(1, some) for head in heads]
    return [*(c for c in lane.columns if isinstance(c, torch.Tensor)), *map(lane.layout.pack, heads)]


def _by_chunk(layout: Layout, value: torch.Tensor) -> torch.Tensor:
    """Return what scripted steps stacked, (rows * batch, length, ...) where rows are folded, as (rows, length, ...)."""
    if layout.strategy is Strategy.SINGLE:
        return value.unsqueeze(0)
    return layout.unpack(value).transpose(1, 2) if layout.strategy is Strategy.FOLD else value


def _inner(
    system: System, layout: Layout, graph: fx.GraphModule, columns: list[Any], length: int, tail: int | None
) -> Loop:
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
    results: list[Any] = [Stacked(output) for output in (*system.components, *system.others)]
    if tail is not None:
        results = [Step(output, step) for output in system.components for step in range(length - tail, length)]
    return layout.loop(graph, length, tuple(bindings), tuple(results))


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
