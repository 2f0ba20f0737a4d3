"""Jacobi-GS: Gauss-Seidel inside chunks of steps, Jacobi from chunk to chunk."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from fxjacobi.footprint import input_bytes
from fxjacobi.methods.chunks import Chunks, Heads, heads_of, prepared, run_chunks, with_heads
from fxjacobi.methods.comparison import compared
from fxjacobi.methods.frozen import apart, independent, settled
from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.settle import (
    amplification,
    changed_steps,
    errors_along,
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
    After ``k`` sweeps the first ``k`` chunks are final; those that are known to be are dropped, half at a time.

    With a ``warm_up`` of ``w`` steps the first chunk starts are not guessed but run: each chunk's from the guess ``w``
    steps before it. Where ``w`` is the recurrence's memory, one sweep is enough, and the arithmetic is
    ``1 + w / chunk`` times that of the steps in order, instead of twice. Chunks are made even,
    ``T = w' + n L``: of a quarter more or less than ``chunk`` steps, so that the rest that ``w'`` takes up is small.

    With ``lanes`` each of so many cores runs chunks of its own, without threads inside its operations (see
    :mod:`fxjacobi.lanes`): for large steps; under a millisecond of them, starting the lanes takes what they save.

    Raises:
        ValueError: The chunk or the lanes are not positive, or the warm-up is negative.
    """

    keeps_bits: ClassVar[bool] = True

    chunk: int = 32
    warm_up: int = 0
    lanes: int = 1

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"a chunk holds at least 1 step, not {self.chunk}")
        if self.warm_up < 0:
            raise ValueError(f"a warm-up takes no steps or more, not {self.warm_up}")
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
        return -(-steps // max(_shortest(self.chunk), reach))

    @override
    def bytes_per_step(self, loop: Loop, size: StateSize) -> int:
        # Rows read their inputs where they lie, but where bits count, or for some samples only.
        return input_bytes(loop)

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        states = replace_non_finite(guess, system.base(), 0)
        return _started(system, states, self.chunk, self.warm_up, self.lanes)

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        chunks: Chunks = iterate.memory
        try:
            swept = run_chunks(system, chunks)
        except torch.OutOfMemoryError:
            if len(chunks.starts) == 1:
                raise
            system.rows_limit = min(system.rows_limit, (len(chunks.starts) + 1) // 2)
            return _started(system, iterate.states, 2 * chunks.length, 0, self.lanes)
        states = _assembled(chunks, swept.states, iterate.states)
        before = tuple((iterate.others or {}).get(o, v) for o, v in zip(system.others, swept.others, strict=True))
        stacked = dict(zip(system.others, _assembled(chunks, swept.others, before), strict=True))
        after = _exchange(system, iterate, states, swept.heads, contract)
        # Samples were left out on evidence that they are independent, so then every equation is looked at again.
        opened = _seams(system, chunks) if chunks.samples is None else None
        return replace(after, others=stacked, open=opened)

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.update == 0.0 if contract.exact else iterate.update <= 1.0


def _started(system: System, states: States, chunk: int, warm_up: int, cores: int) -> Iterate:
    length, warm = _even(system.steps, chunk, warm_up, system.reach, system.rows_limit)
    count = (system.steps - warm) // length
    starts = (0, *(warm + c * length for c in range(1, count)))
    unknown = torch.full((count,), math.inf, dtype=torch.float64)
    chunks = prepared(system, states, starts, length, warm_up=warm, cores=cores)
    chunks = with_heads(chunks, _finite_heads(system, chunks.heads, system.base(), 1))
    return Iterate(states, updates=torch.zeros(count, dtype=torch.float64), gains=unknown, memory=chunks)


@functools.lru_cache(maxsize=256)
def _even(steps: int, chunk: int, warm_up: int, reach: int, rows: int) -> tuple[int, int]:
    """Return the steps of a chunk and of a warm-up that make up ``steps`` evenly, near those asked for.

    A chunk reaches back no further than one chunk, and there are at most ``rows``.
    """
    rest = steps - warm_up
    if steps <= chunk or rest < 2 * reach or rows < 2:
        return steps, 0
    fewest = max(reach, rest // (rows + 1) + 1)
    chunk = max(chunk, fewest)
    if rest < 2 * chunk:
        return rest // 2, steps - rest // 2 * 2
    lengths = range(max(fewest, _shortest(chunk)), min(chunk + chunk // 4, rest // 2) + 1)
    length = min(lengths, key=lambda length: (rest % length + abs(length - chunk), length))
    return length, steps - rest // length * length


def _shortest(chunk: int) -> int:
    return -(-3 * chunk // 4)


def _seams(system: System, chunks: Chunks) -> tuple[int, ...]:
    """The steps that read what is before their chunk: their equations alone may be open."""
    return tuple(sorted({s + j for s in chunks.starts for j in range(system.reach) if s + j < system.steps}))


def _assembled(chunks: Chunks, found: States, states: States) -> States:
    """Return the whole trajectory: ``states`` but for the active chunks and samples, which ``found`` holds."""
    begin = chunks.starts[chunks.first]
    result: list[torch.Tensor] = []
    for before, value in zip(states, found, strict=True):
        if chunks.samples is None:
            result.append(torch.cat([before[:begin], value]) if begin else value)
        else:
            whole = before.clone(memory_format=torch.contiguous_format)
            whole[begin:] = whole[begin:].index_copy(1, chunks.samples, value)
            result.append(whole)
    return tuple(result)


def _exchange(system: System, iterate: Iterate, states: States, used: Heads, contract: Contract) -> Iterate:
    """Compare the chunk starts that were ``used`` with those that came out, and hand the latter over."""
    chunks: Chunks = iterate.memory
    active = chunks.starts[chunks.first :]
    heads = heads_of(system, states, active)
    used = _of_all_samples(chunks, used, heads)
    updates = gains = None
    carried = iterate.carried
    if contract.exact:
        changed = torch.zeros(len(active), dtype=torch.bool, device=heads[0].device)
        for new, old in zip(heads, used, strict=True):
            changed |= changed_steps((new,), (old,))
        final, update = leading(~changed), float(changed.double().mean())
    else:
        moved, floor, off = _moves(system, chunks, states, heads, used, contract)
        update = float(moved.amax())
        assert iterate.updates is not None, "init() sets it"
        assert iterate.gains is not None, "init() sets it"
        updates = torch.zeros_like(iterate.updates)
        updates[chunks.first :] = moved
        if chunks.warm_up:
            gains = _warm_gains(chunks, moved, floor, off)
        else:
            # The next chunk's start moved by the gain of this chunk times the last move of its own start.
            every = torch.zeros_like(updates)
            every[chunks.first :] = floor
            gains = observed_gains(updates, iterate.updates, iterate.gains, every, (1,))
        # What came out is the trajectory from the starts that were used: its error is that before they moved.
        found = errors_along(moved, gains[chunks.first :], floor, (1,), iterate.carried, kept=True, whole=update <= 1.0)
        final, carried = found.final, found.carried
        if update <= 1.0:
            update = max(update, found.before)
    finals = chunks.first + final
    prefix = system.steps if finals == len(chunks.starts) else chunks.starts[finals]
    if prefix == system.steps:
        update = 0.0
    unfinished = update > (0.0 if contract.exact else 1.0)
    following = chunks
    if unfinished:
        samples = _unsettled(system, chunks, heads, used, contract, gains)
        following = with_heads(chunks, _finite_heads(system, heads, system.base(), final + 1))
        if chunks.warm_up or 2 * final >= len(active) or samples is not chunks.samples:
            following = prepared(
                system, states, chunks.starts, chunks.length, finals, samples=samples, cores=chunks.cores
            )
            following = with_heads(following, _finite_heads(system, following.heads, system.base(), 1))
    return replace(
        iterate, states=states, prefix=prefix, update=update, updates=updates, gains=gains, memory=following,
        carried=carried,
    )  # fmt: skip


def _of_all_samples(chunks: Chunks, used: Heads, heads: Heads) -> Heads:
    """Return ``used``, which the samples still iterated read, with what is ``heads`` of the others: these did not move."""
    if chunks.samples is None:
        return used
    return tuple(h.index_copy(1, chunks.samples, u) for h, u in zip(heads, used, strict=True))


def _moves(
    system: System, chunks: Chunks, states: States, heads: Heads, used: Heads, contract: Contract
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return by how much each chunk's start moved, what of it is rounding, and by how much each row's later first was off.

    The last is of no interest, and empty, where rows have no warm-up.
    """
    count = len(heads[0])
    if not chunks.warm_up:
        far = compared(heads, used, contract, samples=apart(system))
        return far.units, far.floor, far.units[:0]
    there = heads_of(system, states, chunks.rows[1:])
    # In one comparison: a call on few rows costs more than its arithmetic.
    far = compared(
        tuple(map(torch.cat, zip(heads, there, strict=True))),
        tuple(torch.cat([u, g[1:]]) for u, g in zip(used, chunks.heads, strict=True)),
        contract,
        samples=apart(system),
    )
    return far.units[:count], far.floor[:count], far.units[count:]


def _warm_gains(chunks: Chunks, moved: torch.Tensor, floor: torch.Tensor, off: torch.Tensor) -> torch.Tensor:
    """Return by how much each chunk passes on what its start is off, as the warm-up did.

    The warm-up to chunk ``c`` began at a guess that was ``off``, and was off by ``moved[c]`` at its end.
    """
    unknown = torch.full_like(off, math.inf)
    gains = torch.where(torch.isfinite(off) & (off > 4 * floor[1:]), moved[1:] / off.clamp_min(1e-300), unknown)
    if chunks.warm_up > chunks.length:  # then it dampened more than a chunk does
        gains = torch.where(gains < 1.0, gains ** (chunks.length / chunks.warm_up), gains)
    return torch.cat([torch.full((1,), math.inf, dtype=gains.dtype), gains])


def _unsettled(
    system: System, chunks: Chunks, heads: Heads, used: Heads, contract: Contract, gains: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the samples whose chunk starts still move; ``chunks.samples`` unless at least half have settled."""
    batch = heads[0].shape[1] if heads[0].dim() > 1 else 1
    if contract.exact or gains is None or batch == 1 or system.batch is not system.body or not independent(system):
        return chunks.samples
    passed = gains[chunks.first :]
    amplified = amplification(passed, torch.ones_like(passed), (1,))
    rest = [settled((n,), (o,), contract, amplified) for n, o in zip(heads, used, strict=True)]
    still = ~torch.stack(rest).all(0)
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
