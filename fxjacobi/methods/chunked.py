"""Jacobi-GS: Gauss-Seidel inside chunks of steps, Jacobi from chunk to chunk."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from fxjacobi.footprint import input_bytes
from fxjacobi.methods.chunks import Chunks, Heads, ends_of, heads_of, prepared, run_chunks, with_heads
from fxjacobi.methods.comparison import compared
from fxjacobi.methods.frozen import independent, settled
from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.settle import (
    changed_steps,
    errors_to_come,
    leading,
    observed_gains,
    replace_non_finite,
)

if TYPE_CHECKING:
    from fxjacobi.footprint import StateSize
    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["Chunked"]


@dataclass(frozen=True)
class Chunked(Method):
    """All chunks' first steps together, then all second steps ...; then chunk ends become the next chunk's start.

    With chunks of ``chunk`` steps and ``F_c`` a run through chunk ``c``: ``y_{c+1} <- F_c(y_c)`` for all ``c`` at once
    (arXiv 2002.03629, section 4.2, Jacobi-GS). A sweep costs ``chunk`` batched steps, so two sweeps, enough where
    a chunk is longer than the recurrence's memory, cost twice the arithmetic and ``2 chunk / T`` of the calls.
    After ``k`` sweeps the first ``k`` chunks are final; those that are known to be are dropped, half at a time. The
    last chunk overlaps the one before where T is no multiple.

    With a ``warm_up`` of ``w`` steps the first chunk starts are not guessed but run: each chunk's from the guess ``w``
    steps before it. Where ``w`` is the recurrence's memory, one sweep is enough, and the arithmetic is
    ``1 + w / chunk`` times that of the steps in order, instead of twice.

    With ``lanes`` each of so many cores runs chunks of its own, without threads inside its operations (see
    :mod:`fxjacobi.lanes`): for large steps; under a millisecond of them, starting the lanes takes what they save.

    Raises:
        ValueError: The chunk or the lanes are not positive, or the warm-up is negative or longer than a chunk.
    """

    keeps_bits: ClassVar[bool] = True

    chunk: int = 32
    warm_up: int = 0
    lanes: int = 1

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"a chunk holds at least 1 step, not {self.chunk}")
        if not 0 <= self.warm_up <= self.chunk:
            raise ValueError(f"a warm-up takes 0 to {self.chunk} steps, the chunk's, not {self.warm_up}")
        if self.lanes < 1:
            raise ValueError(f"at least 1 core runs the chunks, not {self.lanes}")

    @property
    @override
    def cores(self) -> int:
        return self.lanes

    @override
    def applies(self, loop: Loop) -> bool:
        return True

    @override
    def rows_at_once(self, steps: int, reach: int) -> int:
        return -(-steps // max(self.chunk, reach))

    @override
    def bytes_per_step(self, loop: Loop, size: StateSize) -> int:
        # Chunks that start evenly apart read their inputs where they lie.
        return 0 if loop.trip_count % max(self.chunk, size.reach) == 0 else input_bytes(loop)

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        states = replace_non_finite(guess, system.base(), 0)
        # Chunks must reach back no further than one chunk, and one row for each must fit in memory.
        length = max(self.chunk, system.reach, -(-system.steps // system.rows_limit))
        return _started(system, states, min(system.steps, length), self.warm_up, self.lanes)

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        memory: _Memory = iterate.memory
        chunks = memory.chunks
        try:
            found, others = run_chunks(system, chunks)
        except torch.OutOfMemoryError:
            if len(chunks.starts) == 1:
                raise
            system.rows_limit = min(system.rows_limit, (len(chunks.starts) + 1) // 2)
            return _started(system, iterate.states, min(system.steps, 2 * chunks.length), 0, self.lanes)
        states = _assembled(system, chunks, found, iterate.states)
        before = tuple((iterate.others or {}).get(o, v) for o, v in zip(system.others, others, strict=True))
        stacked = dict(zip(system.others, _assembled(system, chunks, others, before), strict=True))
        after = _exchange(system, iterate, states, contract)
        # Samples were left out on evidence that they are independent, so then every equation is looked at again.
        opened = _seams(system, chunks) if chunks.samples is None else None
        return replace(after, others=stacked, open=opened)

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.update == 0.0 if contract.exact else iterate.update <= 1.0


@dataclass(frozen=True, slots=True)
class _Memory:
    """What a sweep hands to the next: the chunks, and from where their first starts were run."""

    chunks: Chunks
    warm_starts: tuple[int, ...] = ()
    warm_heads: Heads = ()


def _started(system: System, states: States, length: int, warm_up: int, cores: int) -> Iterate:
    count = -(-system.steps // length)
    starts = tuple(min(c * length, system.steps - length) for c in range(count))
    unknown = torch.full((count,), math.inf, dtype=torch.float64)
    warm_starts: tuple[int, ...] = ()
    warm_heads: Heads = ()
    if warm_up and count > 1:
        warm = max(system.reach, min(warm_up, starts[1]))
        warm_starts = tuple(max(0, start - warm) for start in starts[1:])
        before = prepared(system, states, warm_starts, warm, 0, tail=system.reach, cores=cores)
        warm_heads = before.heads
        heads = _heads_after(system, heads_of(system, states, starts[:1]), ends_of(system, before))
    else:
        heads = heads_of(system, states, starts)
    heads = _finite_heads(system, heads, system.base(), 1)
    chunks = prepared(system, states, starts, length, 0, heads=heads, cores=cores)
    memory = _Memory(chunks, warm_starts, warm_heads)
    return Iterate(states, updates=torch.zeros(count, dtype=torch.float64), gains=unknown, memory=memory)


def _heads_after(system: System, first: Heads, ends: States) -> Heads:
    """Return what is before the first chunk, (1, ...), and before each other what its warm-up left.

    ``ends`` hold the last steps of the warm-ups, which end where the chunks start: (chunks - 1, reach, *shape).
    """
    result: list[torch.Tensor] = []
    for carry in system.carries:
        values = ends[carry.component]
        for inner in range(carry.depth):
            before = values[:, system.reach - carry.distance + inner]
            result.append(torch.cat([first[len(result)], before]))
    return tuple(result)


def _seams(system: System, chunks: Chunks) -> tuple[int, ...]:
    """The steps that read what is before their chunk: their equations alone may be open."""
    # Where the last chunk overlaps the one before, the trajectory passes over at a multiple of the length.
    seams = {*chunks.starts, *range(0, system.steps, chunks.length)}
    return tuple(sorted({s + j for s in seams for j in range(system.reach) if s + j < system.steps}))


def _assembled(system: System, chunks: Chunks, stacked: States, states: States) -> States:
    """Return the whole trajectory: ``states`` but for the active chunks and samples, which ``stacked`` holds."""
    begin = chunks.starts[chunks.first]
    overlap = begin + (len(chunks.starts) - chunks.first) * chunks.length - system.steps
    result: list[torch.Tensor] = []
    for before, value in zip(states, stacked, strict=True):
        pieces = [value[:-1].flatten(0, 1), value[-1, overlap:]] if overlap else [value.flatten(0, 1)]
        if chunks.samples is None:
            pieces = [before[:begin], *pieces] if begin else pieces
            result.append(torch.cat(pieces) if len(pieces) > 1 else pieces[0])
        else:
            whole = before.clone(memory_format=torch.contiguous_format)
            whole[begin:] = whole[begin:].index_copy(1, chunks.samples, torch.cat(pieces))
            result.append(whole)
    return tuple(result)


def _exchange(system: System, iterate: Iterate, states: States, contract: Contract) -> Iterate:
    """Compare the chunk starts that were used with those that came out, and hand the latter over."""
    memory: _Memory = iterate.memory
    chunks = memory.chunks
    active = chunks.starts[chunks.first :]
    heads = heads_of(system, states, active)
    updates = gains = None
    if contract.exact:
        changed = torch.zeros(len(active), dtype=torch.bool, device=heads[0].device)
        for new, old in zip(heads, chunks.heads, strict=True):
            changed |= changed_steps((new,), (old,))
        final, update = leading(~changed), float(changed.double().mean())
    else:
        apart = compared(heads, chunks.heads, contract)
        moved, floor = apart.units, apart.floor
        final, update = leading(apart.settled), float(moved.amax())
        assert iterate.updates is not None, "init() sets it"
        assert iterate.gains is not None, "init() sets it"
        updates = torch.zeros_like(iterate.updates)
        updates[chunks.first :] = moved
        if memory.warm_starts:
            gains = _warm_gains(system, memory, states, moved, floor, contract)
        else:
            # The next chunk's start moved by the gain of this chunk times the last move of its own start.
            every = torch.zeros_like(updates)
            every[chunks.first :] = floor
            gains = observed_gains(updates, iterate.updates, iterate.gains, every, (1,))
        if update <= 1.0:
            update = max(update, errors_to_come(moved, gains[chunks.first :], floor, (1,))[1])
    finals = chunks.first + final
    prefix = system.steps if finals == len(chunks.starts) else chunks.starts[finals]
    if prefix == system.steps:
        update = 0.0
    unfinished = update > (0.0 if contract.exact else 1.0)
    if not unfinished:
        return replace(iterate, states=states, prefix=prefix, update=update, updates=updates, gains=gains)
    following = with_heads(chunks, _finite_heads(system, heads, system.base(), final + 1))
    samples = _unsettled(system, chunks, heads, contract)
    if 2 * final >= len(active) or samples is not chunks.samples:
        following = prepared(system, states, chunks.starts, chunks.length, finals, samples, cores=chunks.cores)
        following = with_heads(following, _finite_heads(system, following.heads, system.base(), 1))
    return replace(
        iterate, states=states, prefix=prefix, update=update, updates=updates, gains=gains, memory=_Memory(following)
    )


def _warm_gains(
    system: System, memory: _Memory, states: States, moved: torch.Tensor, floor: torch.Tensor, contract: Contract
) -> torch.Tensor:
    """Return by how much each chunk passes on what its start is off, as the warm-up, which is no longer, did.

    The warm-up to chunk ``c`` began at a guess that is off by what the trajectory has there now, and was off by
    ``moved[c]`` at its end.
    """
    off = compared(heads_of(system, states, memory.warm_starts), memory.warm_heads, contract).units
    unknown = torch.full_like(off, math.inf)
    gains = torch.where(torch.isfinite(off) & (off > 4 * floor[1:]), moved[1:] / off.clamp_min(1e-300), unknown)
    return torch.cat([torch.full((1,), math.inf, dtype=gains.dtype), gains])


def _unsettled(system: System, chunks: Chunks, heads: Heads, contract: Contract) -> torch.Tensor | None:
    """Return the samples whose chunk starts still move; ``chunks.samples`` unless at least half have settled."""
    batch = heads[0].shape[1] if heads[0].dim() > 1 else 1
    if contract.exact or batch == 1 or system.batch is not system.body or not independent(system):
        return chunks.samples
    still = ~torch.stack([settled((n,), (o,), contract) for n, o in zip(heads, chunks.heads, strict=True)]).all(0)
    count = int(still.sum())
    before = batch if chunks.samples is None else len(chunks.samples)
    return still.nonzero().squeeze(1).to(heads[0].device) if 0 < 2 * count <= before else chunks.samples


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
