"""Damped quasi-Newton: Levenberg-Marquardt steps, each solved exactly by a parallel Kalman smoother."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from fxjacobi.footprint import row_bytes
from fxjacobi.methods.associative_scan import Elements, affine_scan, strided_scan
from fxjacobi.methods.comparison import compared
from fxjacobi.methods.frozen import apart
from fxjacobi.methods.jacobian import batch_size, diagonals, nearest_carry, windows
from fxjacobi.methods.linearised import advance, has_float_state
from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.settle import distances_of, errors_along, replace_non_finite

if TYPE_CHECKING:
    from fxjacobi.footprint import StateSize
    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["Damped", "smooth"]


@dataclass(frozen=True, slots=True)
class _Region:
    """The trust region: its damping, and the equations at the accepted iterate."""

    batch: int
    damping: float
    values: States | None = None
    diagonal: tuple[torch.Tensor | None, ...] = ()
    merit: float = math.inf


@dataclass(frozen=True)
class Damped(Method):
    """Minimise ``sum_t |s_t - h_t - D_t (s_{t-d} - s^k_{t-d})|^2 + lambda |s_t - s^k_t|^2`` (ELK, arXiv 2407.19115, sec. 4.3).

    A Levenberg-Marquardt step in which the penalty is an observation of the old iterate, so that the minimiser is a
    Kalman smoother's mean, found by parallel scans; ``D_t = diag J_t`` (quasi-ELK). A step that lowers the sum of squared
    residuals is kept and ``lambda`` divided by ten, one that does not is dropped and ``lambda`` multiplied by ten.
    For recurrences where undamped sweeps diverge.

    Raises:
        ValueError: The damping is not positive and finite, or ``probes`` is negative.
    """

    keeps_bits: ClassVar[bool] = False

    damping: float = 1.0
    probes: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.damping) and self.damping > 0):
            raise ValueError(f"damping must be positive and finite, not {self.damping}")
        if self.probes < 0:
            raise ValueError(f"probes must be at least 0, not {self.probes}")

    @override
    def applies(self, loop: Loop) -> bool:
        return has_float_state(loop)

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        return Iterate(replace_non_finite(guess, system.base(), 0), memory=_Region(batch_size(system), self.damping))

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        region: _Region = iterate.memory
        if region.values is None:
            values = system.next_states(iterate.states)
            region = replace(region, values=values, merit=_merit(iterate.states, values))
        assert region.values is not None, "set above"
        if not region.diagonal:
            diagonal = diagonals(system, windows(system, iterate.states), region.batch, self.probes)
            region = replace(region, diagonal=diagonal)
        assert region.values is not None, "replace() keeps it"
        proposal = _proposal(system, iterate.states, region.values, region.diagonal, region.damping)
        moved = advance(system, iterate, contract, region.values, proposal, second_order=False, lands=False)
        values = system.next_states(moved.states)
        if 0.0 < moved.update <= 1.0:
            moved = replace(moved, update=max(moved.update, _error(system, moved, values, contract)))
        merit = _merit(moved.states, values)
        if merit < region.merit or moved.update <= 1.0:
            accepted = _Region(region.batch, region.damping / 10, values, (), merit)
            return replace(moved, memory=accepted)
        return replace(iterate, update=math.inf, memory=replace(region, damping=region.damping * 10))

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.update <= 1.0

    @override
    def of_samples(self, system: System, iterate: Iterate, samples: torch.Tensor) -> Iterate | None:
        region: _Region = iterate.memory
        if region.batch == 1 or region.values is None:
            return None
        states, values = (tuple(s.index_select(1, samples) for s in each) for each in (iterate.states, region.values))
        part = replace(region, batch=samples.shape[0], values=values, diagonal=(), merit=_merit(states, values))
        return replace(iterate, memory=part)

    @override
    def moved(self, before: Iterate, after: Iterate) -> tuple[States, States] | None:
        # A heavily damped step is short, and a dropped one none, wherever the solution is: only the residual tells.
        region: _Region = after.memory
        return None if region.values is None else (region.values, after.states)

    @override
    def bytes_per_step(self, loop: Loop, size: StateSize) -> int:
        # The scan of 2x2 matrices: their entries, and those of its halves.
        return 21 * size.bytes + row_bytes(loop)


def _error(system: System, iterate: Iterate, values: States, contract: Contract) -> float:
    """Return how far the iterate is from the answer by its residual: short steps say nothing of it."""
    assert iterate.seen is not None, "a sweep sets it"
    left, distances = compared(values, iterate.states, contract, samples=apart(system)), distances_of(system)
    found = errors_along(left.units, iterate.seen.gains, left.floor, distances, iterate.carried)
    if found.assumed:
        seen = replace(iterate.seen, values=values).probed(system, iterate.states, left.settled, contract)
        found = errors_along(left.units, seen.gains, left.floor, distances, iterate.carried)
    return found.before


def _merit(states: States, values: States) -> float:
    """Return the sum of squared residuals; infinite when it is not a number."""
    total = 0.0
    for state, value in zip(states, values, strict=True):
        if state.is_floating_point():
            total += float((state - value).double().square().sum())
    return math.inf if math.isnan(total) else total


def _proposal(
    system: System, states: States, values: States, diagonal: tuple[torch.Tensor | None, ...], damping: float
) -> States:
    read = windows(system, states)
    result: list[torch.Tensor] = []
    for component, (state, value, factor) in enumerate(zip(states, values, diagonal, strict=True)):
        if factor is None:
            result.append(value)
            continue
        index = nearest_carry(system, component)
        result.append(smooth(factor, value - factor * read[index], state, damping, system.carries[index].distance))
    return tuple(result)


def smooth(
    factors: torch.Tensor, terms: torch.Tensor, observed: torch.Tensor, damping: float, distance: int = 1
) -> torch.Tensor:
    """Return the ``s`` that minimises ``sum_t (s_t - a_t s_{t-d} - b_t)^2 + lambda (s_t - y_t)^2``, elementwise, (T, ...).

    Kalman filter and Rauch-Tung-Striebel smoother with unit process noise and observation noise ``1 / lambda``; the
    variance ``p -> (a^2 p + 1) / (lambda (a^2 p + 1) + 1)`` is a Moebius map, so its recursion is a scan of 2x2
    matrices, normalised at each product (only their ratio counts).
    """

    def compose(first: Elements, second: Elements) -> Elements:
        a, b, c, d = first
        e, f, g, h = second
        entries = (e * a + f * c, e * b + f * d, g * a + h * c, g * b + h * d)
        largest = torch.stack(entries).amax(0)
        return tuple(entry / largest for entry in entries)

    squares = factors * factors
    one = torch.ones_like(factors)
    matrices = (squares, one, damping * squares, one + damping)
    _, numerator, _, denominator = strided_scan(compose, matrices, distance)
    variance = numerator / denominator
    gain = damping * variance
    filtered = affine_scan((1 - gain) * factors, (1 - gain) * terms + gain * observed, distance)
    if factors.shape[0] <= distance:
        return filtered
    ahead_factor, ahead_term = factors[distance:], terms[distance:]
    predicted = squares[distance:] * variance[:-distance] + 1
    back = torch.zeros_like(filtered)
    back[:-distance] = variance[:-distance] * ahead_factor / predicted
    constant = filtered.clone()
    constant[:-distance] -= back[:-distance] * (ahead_factor * filtered[:-distance] + ahead_term)
    return affine_scan(back.flip(0), constant.flip(0), distance).flip(0)
