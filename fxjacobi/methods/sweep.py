"""One Jacobi sweep over a range of steps, with everything that jacobi and windowed must know of it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fxjacobi.methods.comparison import compared
from fxjacobi.methods.frozen import apart
from fxjacobi.methods.method import Contract, Iterate
from fxjacobi.methods.probe import probed_gains
from fxjacobi.methods.settle import (
    changed_steps,
    distances_of,
    errors_along,
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
    start, distances = iterate.prefix, distances_of(system)
    raw = system.next_states(iterate.states, start, stop)
    old = tuple(value[start:stop] for value in iterate.states)
    if contract.exact:
        changed = changed_steps(raw, old)
        final, update = leading(~changed) + system.nearest, float(changed.double().mean())
        updates, gains, carried = None, None, iterate.carried
    else:
        against = compared(raw, old, contract, samples=apart(system))
        moved, floor = against.units, against.floor
        assert iterate.updates is not None, "started() sets it"
        assert iterate.gains is not None, "started() sets it"
        updates = torch.zeros_like(iterate.updates)
        updates[start:stop] = moved
        every = torch.zeros_like(updates)
        every[start:stop] = floor
        gains = observed_gains(updates, iterate.updates, iterate.gains, every, distances)
        gains[min(seen, stop) :] = math.inf
        update = float(moved.amax())
        whole = update <= 1.0 and stop == system.steps
        found = errors_along(moved, gains[start:stop], floor, distances, iterate.carried, whole=whole)
        if found.assumed:
            gains[start:stop] = probed_gains(
                system, iterate.states, raw, gains[start:stop], moved <= floor, contract, start
            )
            found = errors_along(moved, gains[start:stop], floor, distances, iterate.carried, whole=whole)
        final, carried = found.final, found.carried
        if whole:
            update = max(update, found.after)
    base = tuple(value[start:stop] for value in system.base())
    new = replace_non_finite(raw, base, final)
    states = new
    if start > 0 or stop < system.steps:
        states = tuple(torch.cat([s[:start], n, s[stop:]]) for s, n in zip(iterate.states, new, strict=True))
    prefix = min(stop, start + final)
    if prefix == system.steps:
        update = 0.0
    elif stop < system.steps:
        update = max(update, 1.0 + 1e-9)  # the steps behind the window are not solved yet
    return replace(
        iterate, states=states, prefix=prefix, update=update, updates=updates, gains=gains, stop=stop, carried=carried
    )
