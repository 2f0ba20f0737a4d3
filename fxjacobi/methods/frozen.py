"""Samples of a batch that have converged are frozen: later sweeps evaluate the others alone."""

from __future__ import annotations

import logging
import math
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.batched_body import Strategy
from fxjacobi.bits import equal_elements
from fxjacobi.methods.comparison import compared
from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.probe import disturbed_gains
from fxjacobi.methods.settle import FINAL, amplification, distances_of

if TYPE_CHECKING:
    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["Samples", "apart", "independent", "settled"]

logger = logging.getLogger(__name__)

_EVERY = 4
"""Sweeps from one look at the samples to the next: a look costs a pass over the trajectory."""

_SHARE = 4
"""Frozen are at least one of so many: gathering the others' inputs costs a pass over these."""

_independent: weakref.WeakKeyDictionary[Loop, bool] = weakref.WeakKeyDictionary()
_apart: weakref.WeakKeyDictionary[Loop, bool] = weakref.WeakKeyDictionary()


def independent(system: System) -> bool:
    """Whether dimension 0 of every value that varies is a batch whose samples do not read one another's state.

    Measured once for a loop: the rows of the body fold into dimension 0; other states in half of the samples leave every
    bit of the rest as it was; and half of the samples by themselves give what they give among the others. That is
    evidence and no proof, so whoever rests on it checks all equations of the whole batch at the end.
    """
    found = _independent.get(system.loop)
    if found is None:
        found = _independent[system.loop] = _measured(system)
    return found


def _measured(system: System) -> bool:
    rows = 2
    if system.steps < rows or not system.carries or any(c.before.dim() < 2 for c in system.carries):
        return False
    size = system.carries[0].before.shape[1]
    if size < 2 or any(c.before.shape[1] != size for c in system.carries):
        return False
    generator = torch.Generator().manual_seed(0)  # a private one: the caller's random state stays as it is

    def drawn(like: torch.Tensor) -> torch.Tensor:
        return _drawn(like, generator)

    one = system.fixed(slice(0, rows))
    read = [drawn(c.before[-1:].expand(rows, *c.before.shape[1:])) for c in system.carries]
    if system.body.layout(_with(system, one, read), rows).strategy is not Strategy.FOLD:
        return False
    kept = torch.arange(0, size, 2, device=read[0].device)
    other = [drawn(r).index_copy(1, kept, r.index_select(1, kept)) for r in read]
    among, again = (system.pick(system.body(_with(system, one, r), rows)) for r in (read, other))
    few = system.of_samples(kept)
    alone = few.pick(few.body(_with(few, few.fixed(slice(0, rows)), [r.index_select(1, kept) for r in read]), rows))
    for whole, moved, part in zip(among, again, alone, strict=True):
        wanted = whole.index_select(1, kept)
        if not bool(equal_elements(wanted, moved.index_select(1, kept)).all()):
            return False
        if wanted.is_floating_point() or wanted.is_complex():
            atol = math.sqrt(torch.finfo(wanted.dtype).eps) * float(wanted.abs().nan_to_num(0.0, 0.0, 0.0).amax())
            if bool(
                (compared((wanted,), (part,), Contract(atol=atol + torch.finfo(wanted.dtype).tiny)).units > 1).any()
            ):
                return False
        elif not torch.equal(wanted, part):
            return False
    return True


def apart(system: System) -> bool:
    """Whether dimension 0 of every carried value is a batch whose samples do not read one another's state.

    Measured once for a loop, at random states of one step: for every pair of samples, another state of the one leaves
    every bit of the other as it was. Where it holds, how far a sample has come is judged by its own size.
    """
    found = _apart.get(system.loop)
    if found is None:
        found = _apart[system.loop] = _measured_apart(system)
    return found


def _measured_apart(system: System) -> bool:
    if not system.carries or any(c.before.dim() < 2 for c in system.carries):
        return False
    size = system.carries[0].before.shape[1]
    if size < 2 or any(c.before.shape[1] != size for c in system.carries):
        return False
    generator = torch.Generator().manual_seed(0)  # a private one: the caller's random state stays as it is
    fixed = system.fixed(slice(0, 1))
    read = [_drawn(c.before[-1:], generator) for c in system.carries]
    first = system.pick(system.body(_with(system, fixed, read), 1))
    if any(value.shape[1:2] != (size,) for value in first):
        return False
    number = torch.arange(size)
    for bit in range((size - 1).bit_length()):
        for side in (0, 1):
            kept = ((number >> bit & 1) == side).nonzero().flatten().to(read[0].device)
            other = [_drawn(r, generator).index_copy(1, kept, r.index_select(1, kept)) for r in read]
            again = system.pick(system.body(_with(system, fixed, other), 1))
            pairs = ((a.index_select(1, kept), b.index_select(1, kept)) for a, b in zip(first, again, strict=True))
            if not all(bool(equal_elements(a, b).all()) for a, b in pairs):
                return False
    return True


def _drawn(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if like.is_complex():
        return torch.randn(like.shape, generator=generator, dtype=torch.complex64).to(like)
    return torch.randn(like.shape, generator=generator).to(like) if like.is_floating_point() else like.clone()


def _with(system: System, fixed: list[Any], read: list[torch.Tensor]) -> list[Any]:
    arguments = list(fixed)
    for position, carry in enumerate(system.carries):
        arguments[carry.placeholder] = read[position]
    return arguments


def settled(new: States, old: States, contract: Contract, amplified: float | torch.Tensor) -> torch.Tensor:
    """Return for each sample whether it has come to rest, (B,); states are (T, B, ...).

    No step of it moved by more than rounding; and what it moved by, ``amplified`` (all samples alike, or (B,)) along the
    steps, is no more than a part of the tolerance.
    """
    steps, size = new[0].shape[:2]
    apart_new, apart_old = (tuple(s.flatten(0, 1) for s in states) for states in (new, old))
    found = compared(apart_new, apart_old, contract)
    most = found.units.reshape(steps, size).amax(0)
    rest = found.settled.reshape(steps, size).all(0) & (most * amplified <= FINAL)
    return (rest | (most == 0)).to(new[0].device)


def _amplified(method: Method, iterate: Iterate, system: System) -> float:
    """Return what an update of one unit at each step still adds up to after a sweep; ``inf`` where nothing was seen."""
    gains = effects = iterate.gains
    if iterate.seen is not None:
        residual = type(method).moved is not Method.moved  # then nothing of it has been taken into account
        gains, effects = iterate.seen.gains, torch.ones_like(iterate.seen.gains) if residual else iterate.seen.effects
    return math.inf if gains is None or effects is None else amplification(gains, effects, distances_of(system))


class Samples:
    """The samples that a solve still iterates, for methods that can go on with some of them.

    Every fourth sweep, samples that have come to rest are frozen, if they are a quarter of those left or
    more: their values stay, and the equations of the others are a system of their own.

    Args:
        system: The equations of the whole batch.
        contract: A tolerance; in the exact contract a smaller batch may round otherwise.

    Attributes:
        system: The equations that the next sweep evaluates.
        active: Numbers of the samples that are left; ``None``: all.
        counts: How many samples each sweep evaluated.
    """

    def __init__(self, system: System, contract: Contract) -> None:
        self.whole = system
        self.system = system
        self.contract = contract
        self.active: torch.Tensor | None = None
        self.counts: list[int] = []
        self._states: States | None = None
        self._sweeps = 0
        self._amplified: torch.Tensor | None = None

    @staticmethod
    def of(system: System, method: Method, contract: Contract) -> Samples | None:
        """Return the samples of ``system``; ``None`` where there are none, bits must be kept, or ``method`` takes all."""
        able = type(method).of_samples is not Method.of_samples
        if not able or contract.exact or system.batch is not system.body or not independent(system):
            return None
        return Samples(system, contract)

    def step(self, method: Method, iterate: Iterate) -> Iterate:
        """Return the iterate after one more sweep of ``method`` over the samples that are left."""
        if self.active is not None and method.moves_on(iterate):
            iterate = self.thawed(iterate)
        after = method.step(self.system, iterate, self.contract)
        self.counts.append(after.states[0].shape[1])
        self._sweeps += 1
        moved = method.moved(iterate, after) if self._sweeps % _EVERY == 0 and after.update > 1.0 else None
        return after if moved is None else self._frozen(method, after, *moved)

    def _frozen(self, method: Method, iterate: Iterate, new: States, old: States) -> Iterate:
        done = settled(new, old, self.contract, _amplified(method, iterate, self.system))
        if not self._worth(done) and self._worth(settled(new, old, self.contract, 0.0)):
            # What was seen is the gain of the samples that move most; those that rest may forget much sooner.
            done = settled(new, old, self.contract, self._own(old))
        if not self._worth(done):
            return iterate
        left = (~done).nonzero().flatten()
        part = method.of_samples(self.system, iterate, left)
        if part is None:
            return iterate
        self._states = self._merged(iterate.states)
        self.active = left if self.active is None else self.active[left]
        self.system = self.whole.of_samples(self.active)
        logger.debug("%s: %d samples are left after sweep %d", method.name, left.shape[0], self._sweeps)
        updates = compared(
            tuple(n[:, left] for n in new), tuple(o[:, left] for o in old), self.contract, samples=True
        ).units
        states = tuple(s[:, left] for s in iterate.states)
        seen = replace(part.seen, values=None) if part.seen is not None else None  # those were of more samples
        return replace(part, states=states, updates=updates, seen=seen, others=None, open=None)

    def _worth(self, done: torch.Tensor) -> bool:
        count = int(done.sum())
        return count * _SHARE >= done.shape[0] > count

    def _own(self, states: States) -> torch.Tensor:
        """Return :func:`_amplified` of each active sample by itself, measured once a solve by a disturbance."""
        if self._amplified is None:
            samples = states[0].shape[1]
            gains = disturbed_gains(self.system, states, self.contract, samples)
            self._amplified = torch.full((self.whole.carries[0].before.shape[1],), math.inf, dtype=torch.float64)
            own = [amplification(g, torch.ones_like(g), distances_of(self.system)) for g in gains.unbind(1)]
            where = slice(None) if self.active is None else self.active.cpu()
            self._amplified[where] = torch.tensor(own, dtype=torch.float64)
        return self._amplified if self.active is None else self._amplified[self.active.cpu()]

    def thawed(self, iterate: Iterate) -> Iterate:
        """Return the iterate with all samples in their places."""
        if self.active is None:
            return iterate
        seen = replace(iterate.seen, values=None) if iterate.seen is not None else None
        iterate = replace(iterate, states=self._merged(iterate.states), seen=seen, others=None, open=None)
        self.active, self._states, self.system = None, None, self.whole
        return iterate

    def _merged(self, states: States) -> States:
        if self.active is None or self._states is None:
            return states
        active = self.active
        return tuple(whole.index_copy(1, active, part) for whole, part in zip(self._states, states, strict=True))
