"""Chunks of a loop's steps that run side by side: row ``c`` of inner step ``j`` is step ``starts[c] + j`` of the loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.batched_body import Layout, Strategy
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked
from fxjacobi.scripted_loop import scripted_steps

if TYPE_CHECKING:
    from torch import fx

    from fxjacobi.system import States, System

__all__ = ["Chunks", "Heads", "heads_of", "prepared", "run_chunks", "with_heads"]

Heads = tuple[torch.Tensor, ...]
"""What the chunks read from before themselves: one tensor (chunks, *shape) for each carry and step below its distance."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks still being iterated, laid out for a lean inner loop.

    Args:
        starts: First steps of all chunks, ascending.
        length: Steps of each.
        first: First chunk still iterated.
        heads: See :data:`Heads`; for the chunks still iterated.
        layout: How one inner step of all chunks is evaluated.
        columns: For each placeholder of the body what it reads: ``(length, ...)`` packed, the value itself where it is
            the same throughout, a list where it is a Python value of the step, ``None`` where it is carried.
        inner: The inner steps as a loop of their own, where the layout has a graph.
        samples: The samples of the batch still iterated, where some have settled; ``None``: all. ``heads`` hold all.
    """

    starts: tuple[int, ...]
    length: int
    first: int
    heads: Heads
    layout: Layout
    columns: tuple[Any, ...]
    inner: Loop | None
    samples: torch.Tensor | None = None


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
) -> Chunks:
    """Gather the inputs of the chunks from ``first`` on, and their heads from a trajectory."""
    active = starts[first:]
    rows = len(active)
    device = states[0].device
    steps = torch.tensor(active, device=device) + torch.arange(length, device=device).unsqueeze(1)  # (length, rows)
    heads = heads_of(system, states, active)
    whole = system.fixed(slice(None))
    bindings = system.loop.bindings
    if system.batch is system.body:
        example = list(whole)
        for index, binding in enumerate(bindings):
            if isinstance(binding, Literal):
                example[index] = [binding.values[s] for s in active]
            elif system.body.mapped[index] and whole[index] is not None:
                example[index] = whole[index][steps[0]]
        position = 0
        for carry in system.carries:
            example[carry.placeholder] = heads[position]
            position += carry.depth
        layout = system.body.layout(example, rows)
        graph = layout.graph(system.body.prepare(layout, example))
    else:
        batch = system.batch
        lifted = (False,) * len(whole)
        layout = Layout(Strategy.EACH, rows, lambda *arguments: batch(arguments, rows), lifted, device)
        graph = None
    columns: list[Any] = []
    for index, (binding, value) in enumerate(zip(bindings, whole, strict=True)):
        if value is None or isinstance(binding, Invariant):
            columns.append(value)
        elif isinstance(binding, Literal):
            literals = [layout.literal(index, [value[s + j] for s in active]) for j in range(length)]
            columns.append(torch.stack(literals) if isinstance(literals[0], torch.Tensor) else literals)
        else:
            column = value[steps]
            columns.append(layout.pack(column if samples is None else column.index_select(2, samples), leading=1))
    inner = None if graph is None else _inner(system, layout, graph, columns, length)
    return Chunks(starts, length, first, heads, layout, tuple(columns), inner, samples)


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
    some = chunks.samples
    heads = chunks.heads if some is None else [head.index_select(1, some) for head in chunks.heads]
    packed = [chunks.layout.pack(head) for head in heads]
    steps = scripted_steps(chunks.inner) if chunks.inner is not None else None
    if steps is not None:
        fixed = [c for c in chunks.columns if isinstance(c, torch.Tensor)]
        found = list(steps([*fixed, *packed]))
    else:
        found = _in_python(system, chunks, packed)
    values = [chunks.layout.unpack(value, leading=1).transpose(0, 1) for value in found]
    count = len(system.components)
    return tuple(values[:count]), tuple(values[count:])


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
    results = [Stacked(output) for output in (*system.components, *system.others)]
    return layout.loop(graph, length, tuple(bindings), tuple(results))


def _in_python(system: System, chunks: Chunks, packed: list[torch.Tensor]) -> list[torch.Tensor]:
    outputs = (*system.components, *system.others)
    histories: dict[int, list[torch.Tensor]] = {output: [] for output in outputs}
    slots: list[tuple[int, int, int, int]] = []
    offset = 0
    for carry in system.carries:
        slots.append((carry.placeholder, system.components[carry.component], carry.distance, offset))
        offset += carry.depth
    varying = [not isinstance(b, (Invariant, Carried)) for b in system.loop.bindings]
    for inner in range(chunks.length):
        arguments = [c[inner] if v else c for c, v in zip(chunks.columns, varying, strict=True)]
        for placeholder, output, distance, offset in slots:
            known = inner >= distance
            arguments[placeholder] = histories[output][inner - distance] if known else packed[offset + inner]
        found = chunks.layout.run(*arguments)
        for output, history in histories.items():
            history.append(found[output])
    return [torch.stack(histories[output]) for output in outputs]
