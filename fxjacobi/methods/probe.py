"""By how much each step passes a disturbance on, measured by one: where no update was large enough to tell."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fxjacobi.methods.comparison import compared
from fxjacobi.methods.settle import distances_of

if TYPE_CHECKING:
    from fxjacobi.methods.method import Contract
    from fxjacobi.system import States, System

__all__ = ["disturbed_gains", "probed_gains"]

_SIZE = 256.0
"""Epsilons of a disturbance: rounding changes the gain by a percent or so."""


def probed_gains(
    system: System,
    states: States,
    values: States,
    gains: torch.Tensor,
    settled: torch.Tensor,
    contract: Contract,
    start: int = 0,
) -> torch.Tensor:
    """Return ``gains`` where these were observed, and elsewhere those of a random disturbance, at a sweep's cost.

    They take the place of no gain that a larger update may have: only steps whose inputs ``settled`` get one. A random
    direction is passed on as most are, not as the worst one is.

    Args:
        system: The equations.
        states: A trajectory.
        values: ``h`` of it at the steps from ``start`` on, (n, ...).
        gains: What was observed at these, ``inf`` where nothing, (n,).
        settled: Which of these moved by no more than rounding, (n,).
        contract: The tolerance in whose units gains are.
        start: The first of the steps.
    """
    count, distances = len(gains), distances_of(system)
    moved = _disturbed(states)
    size = compared(moved, states, contract).units
    result = compared(system.next_states(moved, start, start + count), values, contract).units
    incoming = _incoming(size, distances, start, count)
    calm = torch.ones_like(settled)
    for distance in distances:
        if distance < count:
            calm[distance:] &= settled[:-distance]
    found = torch.where(incoming > 0, result / incoming.clamp_min(1e-300), 0.0)
    unknown = torch.isinf(gains) & calm & torch.isfinite(found)
    return torch.where(unknown, found, gains)


def disturbed_gains(system: System, states: States, contract: Contract, samples: int) -> torch.Tensor:
    """Return the gain of a random disturbance at each step of each sample, (T, samples), at the cost of two sweeps.

    Every component of ``states`` is (T, samples, ...).
    """
    moved, steps = _disturbed(states), system.steps

    def apart(new: States, old: States) -> torch.Tensor:
        flat_new, flat_old = (tuple(s.flatten(0, 1) for s in each) for each in (new, old))
        return compared(flat_new, flat_old, contract).units.reshape(steps, samples)

    result = apart(system.next_states(moved), system.next_states(states))
    incoming = _incoming(apart(moved, states), distances_of(system), 0, steps)
    return torch.where(incoming > 0, result / incoming.clamp_min(1e-300), 0.0)


def _incoming(size: torch.Tensor, distances: tuple[int, ...], start: int, count: int) -> torch.Tensor:
    """Return by how much the inputs of steps ``start ..`` are disturbed where states are by ``size``, (count, ...)."""
    incoming = torch.zeros_like(size[:count])
    for distance in distances:
        before = min(distance, start)  # a step's inputs, where it has any in the trajectory
        late = distance - before
        if late < count:
            incoming[late:] = torch.maximum(incoming[late:], size[start - before : start + count - distance])
    return incoming


def _disturbed(states: States) -> States:
    generator = torch.Generator().manual_seed(0)  # a private one: the caller's random state stays as it is
    moved: list[torch.Tensor] = []
    for value in states:
        if (value.is_floating_point() or value.is_complex()) and value.numel():
            sign = torch.randint(0, 2, value.shape[1:], generator=generator).to(value.device) * 2 - 1
            size = torch.linalg.vector_norm(value.reshape(value.shape[0], -1), math.inf, 1)
            scale = (_SIZE * torch.finfo(value.dtype).eps * size).reshape(-1, *[1] * (value.dim() - 1))
            value = value + sign * scale
        moved.append(value)
    return tuple(moved)
