"""How far an iterate is from the answer: updates in units of the tolerance, and the errors still to come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch

from fxjacobi.bits import equal_elements

if TYPE_CHECKING:
    from fxjacobi.methods.method import Contract
    from fxjacobi.system import States, System

__all__ = [
    "FINAL",
    "ROUNDING",
    "Errors",
    "PassedOn",
    "amplification",
    "changed_steps",
    "distances_of",
    "errors_along",
    "floors",
    "geometric_remainder",
    "leading",
    "observed_gains",
    "observed_ratios",
    "replace_non_finite",
]

ROUNDING = 8.0
"""Multiples of the machine epsilon by which one evaluation in another order of rounding may differ."""

_ROUNDED = 0.5 / ROUNDING
"""Share of the level of rounding that one step of the ordinary run is taken to round by."""

FINAL = 0.25
"""Share of the tolerance that the error of a final step may have: all steps that follow are passed it on."""

PassedOn: TypeAlias = tuple[tuple[float, float], ...]
"""Errors that steps hand on, each with the variance of the rounding of the steps in order."""

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


@dataclass(frozen=True, slots=True)
class Errors:
    """How far an iterate may be from the answer, in units of the tolerance: what updates add up to along the steps.

    Args:
        final: Leading steps whose inputs settled and whose error is as small as rounding, or a part of the tolerance.
        carried: For the last final steps, as many as the furthest carry reaches: the error, and the variance that the
            rounding of the steps in order has by then.
        after: The largest error of the iterate after the sweep; at most one where it is that of the ordinary run.
        before: Likewise of the one before.
        assumed: Whether gains that were not observed, and count as one, may be why no more is final or within tolerance.
    """

    final: int
    carried: PassedOn
    after: float
    before: float
    assumed: bool


def errors_along(
    updates: torch.Tensor,
    gains: torch.Tensor,
    floor: torch.Tensor,
    distances: tuple[int, ...],
    carried: PassedOn = (),
    *,
    effects: torch.Tensor | None = None,
    settled: torch.Tensor | None = None,
    kept: bool = False,
    share: float = FINAL,
    whole: bool = True,
) -> Errors:
    """Return how far an iterate is from the answer after a sweep, and was before it.

    A Jacobi iterate is ``s = h(old)`` with updates ``u = s - old``. Its error obeys ``e_t = J_t (e_{t-d} + u_{t-d})``, and
    later updates are passed on by the same ``J_t``, whose gain along them was observed. An update within rounding is not
    nothing: a drift of an epsilon a step is the whole answer after enough of them. Where no gain was observed, updates
    within rounding count as passed on undiminished, and larger ones as passed on without bound.

    The ordinary run rounds at every step, too. Where that amounts to more than the tolerance, an error of its size will do.

    Args:
        updates: ``|u_t|`` of the evaluated steps, (n,).
        gains: Observed gain of each, ``inf`` where none was observed yet, (n,).
        floor: Rounding level of each, (n,).
        distances: Distances of the carries.
        carried: The errors of the steps before the first evaluated one, as :class:`Errors` has them; none: exact.
        effects: What is left at each step of an update of its inputs, where a method took a part of ``J_t`` into
            account, (n,); ``gains`` by default.
        settled: Which steps count as settled, (n,); those that moved by no more than rounding by default.
        kept: Whether the old iterate is the one that goes on, so that final are the steps that settled themselves.
        share: See :data:`FINAL`.
        whole: Look at all steps, not just at the leading ones that settled.
    """
    reach = max(distances)
    known = [*[(0.0, 0.0)] * (reach - len(carried)), *carried[-reach:]]
    errors, variances = [e for e, _ in known], [v for _, v in known]
    moves, small = [0.0] * reach, [True] * reach
    after = before = 0.0
    assumed = far = False
    final, open_at, counting = 0, math.inf, True
    nearest, *further = distances
    still = updates <= floor if settled is None else settled
    passed = gains.tolist()
    left = passed if effects is None else effects.tolist()
    rows = zip(updates.tolist(), passed, left, floor.tolist(), still.tolist(), strict=True)
    for step, (update, gain, effect, level, calm) in enumerate(rows):
        incoming, moved, variance, tiny = errors[-nearest], moves[-nearest], variances[-nearest], small[-nearest]
        for distance in further:
            incoming, moved = max(incoming, errors[-distance]), max(moved, moves[-distance])
            variance, tiny = min(variance, variances[-distance]), tiny and small[-distance]
        if tiny and (gain == math.inf or effect == math.inf):
            assumed = assumed or incoming + moved > 0.0
            gain, effect = (1.0 if g == math.inf else g for g in (gain, effect))
        error = (gain * incoming if incoming else 0.0) + (effect * moved if moved else 0.0)
        variance = (variance if gain == math.inf else gain * gain * variance) + (level * _ROUNDED) ** 2
        rounded = level >= error or variance >= error * error < math.inf
        if counting:
            far = not rounded and error > share
            counting = not far and (calm if kept else step < open_at + nearest)
            final += counting
            if not (counting or whole):
                break
            if open_at == math.inf and not calm:
                open_at = step
        worst = min(error, 1.0) if rounded else error
        after, before = max(after, worst), max(before, worst + update)
        errors.append(error)
        moves.append(update)
        variances.append(variance)
        small.append(update <= level and (tiny or error <= level))
    if kept:
        errors = [error + move for error, move in zip(errors, moves, strict=True)]
    last = slice(final, final + reach)
    return Errors(
        final, tuple(zip(errors[last], variances[last], strict=True)), after, before, assumed and (far or after > 1.0)
    )


def amplification(gains: torch.Tensor, effects: torch.Tensor, distances: tuple[int, ...]) -> float:
    """Return what updates of one unit at every step add up to at most; a gain that was not observed counts as one.

    Arguments are those of :func:`errors_along`.
    """
    largest, sums = 0.0, [0.0] * max(distances)
    known = (torch.where(torch.isinf(each), 1.0, each).tolist() for each in (gains, effects))
    for gain, effect in zip(*known, strict=True):
        sums.append(gain * max(sums[-distance] for distance in distances) + effect)
        largest = max(largest, sums[-1])
    return largest


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
        inexact = value.is_floating_point() or value.is_complex()
        if inexact and not bool(torch.isfinite(looked_at).all()):
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
