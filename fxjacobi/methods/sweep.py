"""One Jacobi sweep over a range of steps, with everything that jacobi and windowed must know of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fxjacobi.methods.comparison import compared
from fxjacobi.methods.method import Contract, Iterate
from fxjacobi.methods.settle import (
    changed_steps,
    distances_of,
    errors_to_come,
    leading,
    observed_gains,
    replace_non_finite,
)

if TYPE_CHECKING:
    from fxjacobi.system import States, System

__all__ = ["started", "sweep"]


def started(system: System, guess: States, memory: object = None) -> Iterate:
    """Return the iterate before the first sweep; a non-finite guess is replaced by the base values."""
    return Iterate(
        states=replace_non_finite(guess, system.base(), 0),
        updates=torch.zeros(system.steps, dtype=torch.float64),
        gains=torch.full((system.steps,), math.inf, dtype=torch.float64),
        memory=memory,
    )


def sweep(system: System, iterate: Iterate, contract: Contract, stop: int, seen: int) -> Iterate:
    """Evaluate steps ``prefix .. stop-1`` at once: ``s_t <- h_t(s_{t-d})`` (arXiv 2002.03629, Algorithm 1).

    A step is final when its inputs are. Hence leading steps that a sweep did not change are final, and so are the
    ``d`` after them: in the exact contract unchanged means bit for bit, in the other within rounding.

    Args:
        system: The equations.
        iterate: One that :func:`started` or a sweep returned.
        contract: Exact, or the tolerance that updates are measured in.
        stop: Where the range ends.
        seen: Where the range of the sweep before ended: behind it an update says how wrong the guess was, and
            nothing of how updates are passed on.
    """
    start = iterate.prefix
    raw = system.next_states(iterate.states, start, stop)
    old = tuple(value[start:stop] for value in iterate.states)
    if contract.exact:
        changed = changed_steps(raw, old)
        unchanged, update = leading(~changed), float(changed.double().mean())
        updates = gains = None
    else:
        against = compared(raw, old, contract)
        moved, floor, unchanged = against.units, against.floor, leading(against.settled)
        assert iterate.updates is not None, "started() sets it"
        assert iterate.gains is not None, "started() sets it"
        updates = torch.zeros_like(iterate.updates)
        updates[start:stop] = moved
        every = torch.zeros_like(updates)
        every[start:stop] = floor
        gains = observed_gains(updates, iterate.updates, iterate.gains, every, distances_of(system))
        gains[min(seen, stop) :] = math.inf
        update = float(moved.amax())
        if update <= 1.0 and stop == system.steps:
            update = max(update, errors_to_come(moved, gains[start:stop], floor, distances_of(system))[0])
    base = tuple(value[start:stop] for value in system.base())
    new = replace_non_finite(raw, base, unchanged + system.nearest)
    states = new
    if start > 0 or stop < system.steps:
        states = tuple(torch.cat([s[:start], n, s[stop:]]) for s, n in zip(iterate.states, new, strict=True))
    prefix = min(stop, start + unchanged + system.nearest)
    if prefix == system.steps:
        update = 0.0
    elif stop < system.steps:
        update = max(update, 1.0 + 1e-9)  # the steps behind the window are not solved yet
    return replace(iterate, states=states, prefix=prefix, update=update, updates=updates, gains=gains, stop=stop)
