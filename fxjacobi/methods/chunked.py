"""Jacobi-GS: Gauss-Seidel inside chunks of steps, Jacobi from chunk to chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import override

from fxjacobi.batched_body import Layout, Strategy
from fxjacobi.loops import Invariant, Literal
from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.settle import (
    changed_steps,
    errors_to_come,
    floors,
    leading,
    observed_gains,
    replace_non_finite,
    units,
)

if TYPE_CHECKING:
    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["Chunked", "Chunks", "prepared", "run_chunks"]

Heads = tuple[torch.Tensor, ...]
"""What the chunks read from before themselves: one tensor (chunks, *shape) for each carry and step below its distance."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """The chunks still being iterated, laid out for a lean inner loop."""

    starts: tuple[int, ...]  # of all chunks
    length: int
    first: int  # first chunk still iterated
    heads: Heads
    layout: Layout
    inputs: tuple[tuple[Any, ...], ...]  # for each inner step, the body's packed arguments; None where carried


@dataclass(frozen=True)
class Chunked(Method):
    """All chunks' first steps together, then all second steps ...; then chunk ends become the next chunk's start.

    With chunks of ``chunk`` steps and ``F_c`` a run through chunk ``c``: ``y_{c+1} <- F_c(y_c)`` for all ``c`` at once
    (arXiv 2002.03629, section 4.2, Jacobi-GS). A sweep costs ``chunk`` batched steps, so two sweeps, enough where
    a chunk is longer than the recurrence's memory, cost twice the arithmetic and ``2 chunk / T`` of the calls.
    After ``k`` sweeps the first ``k`` chunks are final; those that are known to be are dropped, half at a time. The
    last chunk overlaps the one before where T is no multiple.

    Raises:
        ValueError: The chunk is not positive.
    """

    keeps_bits: ClassVar[bool] = True

    chunk: int = 32

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"a chunk holds at least 1 step, not {self.chunk}")

    @override
    def applies(self, loop: Loop) -> bool:
        return True

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        states = replace_non_finite(guess, system.base(), 0)
        # Chunks must reach back no further than one chunk, and one row for each must fit in memory.
        length = max(self.chunk, system.reach, -(-system.steps // system.rows_limit))
        return _started(system, states, min(system.steps, length))

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        chunks: Chunks = iterate.memory
        try:
            states = _assembled(system, chunks, run_chunks(system, chunks), iterate.states)
        except torch.OutOfMemoryError:
            if len(chunks.starts) == 1:
                raise
            return _started(system, iterate.states, min(system.steps, 2 * chunks.length))
        return _exchange(system, iterate, states, contract)

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.update == 0.0 if contract.exact else iterate.update <= 1.0


def _started(system: System, states: States, length: int) -> Iterate:
    count = -(-system.steps // length)
    starts = tuple(min(c * length, system.steps - length) for c in range(count))
    unknown = torch.full((count,), math.inf, dtype=torch.float64)
    chunks = prepared(system, states, starts, length, 0)
    return Iterate(states, updates=torch.zeros(count, dtype=torch.float64), gains=unknown, memory=chunks)


def prepared(system: System, states: States, starts: tuple[int, ...], length: int, first: int) -> Chunks:
    """Gather the inputs of the chunks from ``first`` on, and their heads from a trajectory."""
    active = starts[first:]
    rows = len(active)
    device = states[0].device
    steps = torch.tensor(active, device=device) + torch.arange(length, device=device).unsqueeze(1)  # (length, rows)
    heads = _heads(system, states, active)
    whole = system.fixed(slice(None))
    if system.batch is system.body:
        example = list(whole)
        for index, binding in enumerate(system.loop.bindings):
            if isinstance(binding, Literal):
                example[index] = [binding.values[s] for s in active]
            elif system.body.mapped[index] and whole[index] is not None:
                example[index] = whole[index][steps[0]]
        position = 0
        for carry in system.carries:
            example[carry.placeholder] = heads[position]
            position += carry.depth
        layout = system.body.layout(example, rows)
    else:
        batch = system.batch
        lifted = (False,) * len(whole)
        layout = Layout(Strategy.EACH, rows, lambda *arguments: batch(arguments, rows), lifted, device)
    columns: list[list[Any]] = []
    for index, (binding, value) in enumerate(zip(system.loop.bindings, whole, strict=True)):
        if value is None or isinstance(binding, Invariant):
            columns.append([value] * length)
        elif isinstance(binding, Literal):
            columns.append([layout.literal(index, [value[s + j] for s in active]) for j in range(length)])
        else:
            columns.append(list(layout.pack(value[steps], leading=1).unbind(0)))
    return Chunks(starts, length, first, heads, layout, tuple(zip(*columns, strict=True)))


def _heads(system: System, states: States, starts: tuple[int, ...]) -> Heads:
    """Return what each carry reads at steps ``start + j``, ``j < distance``, of each chunk."""
    heads: list[torch.Tensor] = []
    for carry in system.carries:
        values = states[carry.component]
        for inner in range(carry.depth):
            at = [start + inner - carry.distance for start in starts]
            outside = sum(a < 0 for a in at)  # starts ascend
            head = values[torch.tensor([max(a, 0) for a in at], device=values.device)]
            for row in range(outside):
                head[row] = carry.before[starts[row] + inner]
            heads.append(head)
    return tuple(heads)


def run_chunks(system: System, chunks: Chunks) -> States:
    """Run all active chunks from their heads; return each component as ``(chunks, length, *shape)``."""
    layout, run = chunks.layout, chunks.layout.run
    packed = [layout.pack(head) for head in chunks.heads]
    histories: list[list[torch.Tensor]] = [[] for _ in system.components]
    slots: list[tuple[int, int, int, int]] = []
    offset = 0
    for carry in system.carries:
        slots.append((carry.placeholder, carry.component, carry.distance, offset))
        offset += carry.depth
    for inner in range(chunks.length):
        arguments = list(chunks.inputs[inner])
        for placeholder, component, distance, offset in slots:
            known = inner >= distance
            arguments[placeholder] = histories[component][inner - distance] if known else packed[offset + inner]
        outputs = run(*arguments)
        for history, output in zip(histories, system.components, strict=True):
            history.append(outputs[output])
    return tuple(torch.stack([layout.unpack(value) for value in history], dim=1) for history in histories)


def _assembled(system: System, chunks: Chunks, stacked: States, states: States) -> States:
    """Return the whole trajectory: ``states`` before the active chunks, and these."""
    begin = chunks.starts[chunks.first]
    overlap = begin + (len(chunks.starts) - chunks.first) * chunks.length - system.steps
    result: list[torch.Tensor] = []
    for before, value in zip(states, stacked, strict=True):
        pieces = [before[:begin]] if begin else []
        pieces += [value[:-1].flatten(0, 1), value[-1, overlap:]] if overlap else [value.flatten(0, 1)]
        result.append(torch.cat(pieces) if len(pieces) > 1 else pieces[0])
    return tuple(result)


def _exchange(system: System, iterate: Iterate, states: States, contract: Contract) -> Iterate:
    """Compare the chunk starts that were used with those that came out, and hand the latter over."""
    chunks: Chunks = iterate.memory
    active = chunks.starts[chunks.first :]
    heads = _heads(system, states, active)
    updates = gains = None
    if contract.exact:
        changed = torch.zeros(len(active), dtype=torch.bool, device=heads[0].device)
        for new, old in zip(heads, chunks.heads, strict=True):
            changed |= changed_steps((new,), (old,))
        final, update = leading(~changed), float(changed.double().mean())
    else:
        moved = (
            torch.stack([units((n,), (o,), contract) for n, o in zip(heads, chunks.heads, strict=True)]).amax(0).cpu()
        )
        floor = torch.stack([floors((head,), contract) for head in heads]).amax(0).cpu()
        final, update = leading(moved <= floor), float(moved.amax())
        assert iterate.updates is not None, "init() sets it"
        assert iterate.gains is not None, "init() sets it"
        # The next chunk's start moved by the gain of this chunk times the last move of its own start.
        updates, gains = torch.zeros_like(iterate.updates), iterate.gains
        updates[chunks.first :] = moved
        every = torch.zeros_like(updates)
        every[chunks.first :] = floor
        gains = observed_gains(updates, iterate.updates, gains, every, (1,))
        if update <= 1.0:
            update = max(update, errors_to_come(moved, gains[chunks.first :], floor, (1,))[1])
    finals = chunks.first + final
    prefix = system.steps if finals == len(chunks.starts) else chunks.starts[finals]
    if prefix == system.steps:
        update = 0.0
    base = system.base()
    memory = replace(chunks, heads=_finite_heads(system, heads, base, final + 1))
    unfinished = update > (0.0 if contract.exact else 1.0)
    if unfinished and 2 * final >= len(active):
        memory = prepared(system, states, chunks.starts, chunks.length, finals)
        memory = replace(memory, heads=_finite_heads(system, memory.heads, base, 1))
    return replace(iterate, states=states, prefix=prefix, update=update, updates=updates, gains=gains, memory=memory)


def _finite_heads(system: System, heads: Heads, base: States, final: int) -> Heads:
    """Replace non-finite guesses among the heads, which are final in the first ``final`` chunks."""
    replaced: list[torch.Tensor] = []
    position = 0
    for carry in system.carries:
        for _ in range(carry.depth):
            head = heads[position]
            reset = base[carry.component][: head.shape[0]]
            replaced.append(replace_non_finite((head,), (reset,), final)[0])
            position += 1
    return tuple(replaced)
