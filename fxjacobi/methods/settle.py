"""How far an iterate is from the answer: updates in units of the tolerance, and the errors still to come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fxjacobi.bits import equal_elements

if TYPE_CHECKING:
    from fxjacobi.methods.method import Contract
    from fxjacobi.system import States, System

__all__ = [
    "ROUNDING",
    "changed_steps",
    "distances_of",
    "errors_to_come",
    "floors",
    "geometric_remainder",
    "leading",
    "observed_gains",
    "observed_ratios",
    "replace_non_finite",
]

ROUNDING = 8.0
"""Multiples of the machine epsilon by which one evaluation in another order of rounding may differ."""

# Below this many epsilons an update is mostly rounding, and the ratio of two of them says nothing.
_SIGNAL = 32.0


def changed_steps(new: States, old: States) -> torch.Tensor:
    """Return for each step whether any bit-visible element changed (NaN equals NaN)."""
    changed = torch.zeros(new[0].shape[0], dtype=torch.bool, device=new[0].device)
    for a, b in zip(new, old, strict=True):
        changed |= ~equal_elements(a, b).flatten(1).all(1) if a.dim() > 1 else ~equal_elements(a, b)
    return changed


def _flat(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(value.shape[0], -1)


def floors(states: States, contract: Contract) -> torch.Tensor:
    """Return for each step the update, in units of the tolerance, that cannot be told from rounding, (n,).

    Between one epsilon and :data:`ROUNDING` epsilons of ``max |s_t|``; one unit where the tolerance lies between.
    """
    result = torch.zeros(states[0].shape[0], dtype=torch.float64, device=states[0].device)
    for value in states:
        if value.is_floating_point() or value.is_complex():
            size = torch.linalg.vector_norm(_flat(value), math.inf, 1).double()
            size = torch.where(torch.isfinite(size), size, torch.zeros_like(size))
            tolerance = contract.atol + contract.rtol * size
            epsilon = torch.finfo(value.dtype).eps * size
            floor = torch.minimum(torch.maximum(tolerance, epsilon), ROUNDING * epsilon) / tolerance
            result = torch.maximum(result, torch.where(tolerance > 0, floor, torch.zeros_like(floor)))
    return result


def errors_to_come(
    updates: torch.Tensor, gains: torch.Tensor, floor: torch.Tensor, distances: tuple[int, ...]
) -> tuple[float, float]:
    """Return, in units of the tolerance, the largest error of a Jacobi iterate after a sweep, and that before it.

    The iterate is ``s = h(old)`` with updates ``u = s - old``. Its error obeys ``e_t = J_t (e_{t-d} + u_{t-d})``, and
    later updates are passed on by the same ``J_t``, whose gain along them was observed. Sums at the level of
    rounding count as nothing. The steps before the first evaluated one are final.

    Args:
        updates: ``|u_t|`` of the evaluated steps, (n,).
        gains: Observed gain of each, ``inf`` where none was observed yet, (n,).
        floor: Rounding level of each, (n,).
        distances: Distances of the carries.
    """
    pending = [0.0] * max(distances)
    after = before = 0.0
    nearest, *further = distances
    for update, gain, rounding in zip(updates.tolist(), gains.tolist(), floor.tolist(), strict=True):
        incoming = pending[-nearest]
        for distance in further:
            incoming = max(incoming, pending[-distance])
        error = 0.0 if incoming == 0.0 else gain * incoming
        total = error + update
        # Not max(): this loop is half of a small solve's bookkeeping. A NaN counts for nothing here, as in max().
        after = error if error > after else after  # noqa: FURB136
        before = total if total > before else before  # noqa: FURB136
        pending.append(0.0 if total <= rounding else total)
    return after, before


def observed_ratios(
    updates: torch.Tensor, earlier: torch.Tensor, ratios: torch.Tensor, floor: torch.Tensor
) -> torch.Tensor:
    """Return ``ratios`` of successive updates, renewed at the steps whose earlier update was more than rounding, (T,)."""
    informative = torch.isfinite(earlier) & (earlier > _SIGNAL / ROUNDING * floor)
    return torch.where(informative, updates / earlier.clamp_min(1e-300), ratios)


def geometric_remainder(updates: torch.Tensor, ratios: torch.Tensor, floor: torch.Tensor) -> float:
    """Return the largest ``u q / (1 - q)`` over the steps: what updates that shrink by ``q`` each would still add."""
    remainder = torch.where(ratios < 1.0, updates * ratios / (1.0 - ratios).clamp_min(1e-300), math.inf)
    return float(torch.where(updates <= floor, torch.zeros_like(updates), remainder).amax())


def observed_gains(
    updates: torch.Tensor, earlier: torch.Tensor, gains: torch.Tensor, floor: torch.Tensor, distances: tuple[int, ...]
) -> torch.Tensor:
    """Return ``gains`` renewed where the sweep before moved the inputs of a step by more than rounding, (T,)."""
    incoming = torch.zeros_like(earlier)
    for distance in distances:
        if distance < earlier.shape[0]:
            incoming[distance:] = torch.maximum(incoming[distance:], earlier[:-distance])
    informative = torch.isfinite(incoming) & torch.isfinite(updates) & (incoming > _SIGNAL / ROUNDING * floor)
    return torch.where(informative, updates / incoming.clamp_min(1e-300), gains)


def replace_non_finite(new: States, base: States, prefix: int) -> States:
    """Return ``new`` with the base values in each non-finite step after ``prefix``: a guess, never an answer."""
    states: list[torch.Tensor] = []
    for value, reset in zip(new, base, strict=True):
        # An expanded guess (all steps alike) is looked at once.
        looked_at = value[:1] if value.stride(0) == 0 else value[prefix:]
        if value.is_floating_point() and not bool(torch.isfinite(looked_at).all()):
            bad = ~torch.isfinite(value)
            bad[:prefix] = False
            value = torch.where(bad, reset, value)
        states.append(value)
    return tuple(states)


def leading(holds: torch.Tensor) -> int:
    """Return the number of leading entries that are true."""
    return holds.shape[0] if bool(holds.all()) else int((~holds).to(torch.uint8).argmax())


def distances_of(system: System) -> tuple[int, ...]:
    """Return the distances of the system's carries, each once."""
    return tuple(sorted({carry.distance for carry in system.carries}))
