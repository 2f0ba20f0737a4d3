"""What the methods that solve a linear system each sweep share: the step from old iterate and proposal to the new."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.loops import Carried
from fxjacobi.methods.associative_scan import affine_scan
from fxjacobi.methods.comparison import compared
from fxjacobi.methods.frozen import apart
from fxjacobi.methods.jacobian import nearest_carry, windows
from fxjacobi.methods.probe import probed_gains
from fxjacobi.methods.settle import (
    Errors,
    changed_steps,
    distances_of,
    errors_along,
    geometric_remainder,
    leading,
    observed_gains,
    observed_ratios,
    replace_non_finite,
)

if TYPE_CHECKING:
    from fxjacobi.loops import Loop
    from fxjacobi.methods.method import Contract, Iterate
    from fxjacobi.system import States, System

__all__ = ["Seen", "advance", "flattened", "has_float_state", "scan_diagonal", "unflattened"]


def has_float_state(loop: Loop) -> bool:
    """Whether some carried value is floating-point, so that there is a Jacobian."""
    placeholders = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
    specs = [spec_of(p) for p, b in zip(placeholders, loop.bindings, strict=True) if isinstance(b, Carried)]
    return any(isinstance(s, TensorSpec) and s.dtype.is_floating_point for s in specs)


def advance(
    system: System,
    iterate: Iterate,
    contract: Contract,
    values: States,
    proposal: States,
    *,
    second_order: bool,
    rounded: torch.Tensor | None = None,
    lands: bool = True,
    combines: bool = False,
) -> Iterate:
    """Return the iterate whose trajectory is ``proposal``, given ``values = h(iterate.states)``.

    Steps whose inputs are final to the bit take ``values``: so these methods, too, reach the answer in ``T`` sweeps at
    most. All others take the proposal, those of the prefix that rounding still moves included: from where it is not
    taken, what these roundings add up to would be missing. Where the proposal is not finite it is replaced by
    ``values``, then by the base values.

    An error obeys ``e_t = J_t e_{t-d} + (J_t - D_t) u_{t-d}`` where ``u`` is the update and ``D_t`` what the proposal took
    of ``J_t`` into account; both factors are observed (:class:`Seen`). For updates above rounding, which are many sweeps'
    at most, equal ratios of successive ones must add up to no more than the tolerance; those within rounding, which may be
    all steps', are added up along the steps.

    Args:
        system: The equations.
        iterate: Where the sweep started.
        contract: The tolerance that updates are measured in.
        values: ``h`` of its trajectory.
        proposal: What the method makes of it.
        second_order: Whether the update itself estimates the error of the old iterate, amplification by later steps
            included, as a Newton update does: then what is left of it is of second order.
        rounded: How many times more than by one evaluation's rounding the steps of a proposal move that adds values of
            earlier steps up, (T,); updates within it, and within the tolerance, are taken for rounding.
        lands: Whether a proposal gets to where it goes. A damped one goes a part of the way, and to a state of zero, where
            no update is small, never: there all steps whose inputs are final within rounding take ``values``, and what
            small updates still add up to is the caller's business, who knows the next residual.
        combines: Whether a proposal is a Jacobi sweep's beside a combination of earlier ones, so that a small update says
            little: what is left is then what it would be after the Jacobi sweep.
    """
    base, distances = system.base(), distances_of(system)
    samples = apart(system)
    against = compared(values, iterate.states, contract, samples=samples)
    floor = against.floor if rounded is None else (against.floor * rounded).minimum(against.floor.clamp_min(1.0))
    earlier = iterate.updates if iterate.updates is not None else torch.zeros_like(floor)
    seen = _seen(iterate.seen, values, against.units, earlier, floor, contract, distances, samples)

    def along(updates: torch.Tensor, effects: torch.Tensor, *, whole: bool) -> Errors:
        small = torch.where(updates <= floor, updates, 0.0)
        calm = against.settled & (updates <= floor)
        return errors_along(
            small, seen.gains, floor, distances, iterate.carried, effects=effects, settled=calm, whole=whole
        )

    exact = min(system.steps, leading(against.units == 0) + system.nearest)
    final = along(against.units, seen.gains, whole=False).final if not lands else 0  # by what is left of the residual
    exact = max(exact, final)
    fallback = replace_non_finite(values, base, exact)
    new = tuple(torch.cat([v[:exact], p[exact:]]) for v, p in zip(values, proposal, strict=True))
    new = replace_non_finite(new, fallback, exact)
    updates = compared(new, iterate.states, contract, samples=samples).units
    update = float(updates.amax())
    ratios = iterate.gains if iterate.gains is not None else torch.full_like(updates, math.inf)
    ratios = observed_ratios(updates, earlier, ratios, floor)
    if update <= 1.0 and not second_order:
        update = max(update, geometric_remainder(updates, ratios, floor))
    if lands:
        whole, moved = update <= 1.0, against.units if combines else updates
        found = along(moved, seen.left(second_order, combines), whole=whole)
        if found.assumed:
            seen = seen.probed(system, iterate.states, updates <= floor, contract)
            found = along(moved, seen.left(second_order, combines), whole=whole)
        final = found.final
        if whole:
            update = max(update, found.after)
    prefix = max(exact, final)
    if prefix == system.steps:
        update = 0.0
    update = math.inf if math.isnan(update) else update
    return replace(iterate, states=new, prefix=prefix, update=update, updates=updates, gains=ratios, seen=seen)


@dataclass(frozen=True, slots=True)
class Seen:
    """What sweeps have shown of how steps pass updates on.

    Args:
        values: ``h`` of the trajectory that the last sweep started from; ``None`` where it is not that of these samples.
        gains: ``|h_t(s + u) - h_t(s)| / |u_{t-d}|`` of the last update that was more than rounding, ``inf`` before, (T,).
        effects: What the method left of it, ``|h_t(s + u) - (s + u)_t| / |u_{t-d}|``, likewise.
    """

    values: States | None
    gains: torch.Tensor
    effects: torch.Tensor

    def left(self, second_order: bool, combines: bool) -> torch.Tensor:
        """Return what is left at each step of an update of its inputs, (T,); see :func:`advance`."""
        if second_order:
            return torch.zeros_like(self.effects)
        return self.gains if combines else self.effects

    def probed(self, system: System, states: States, settled: torch.Tensor, contract: Contract) -> Seen:
        """Return gains where none were observed from a disturbance; of what a method leaves these are a bound."""
        assert self.values is not None, "a sweep sets it"
        gains = probed_gains(system, states, self.values, self.gains, settled, contract)
        return Seen(self.values, gains, torch.where(torch.isinf(self.effects), gains, self.effects))


def _seen(
    before: Seen | None,
    values: States,
    residual: torch.Tensor,
    updates: torch.Tensor,
    floor: torch.Tensor,
    contract: Contract,
    distances: tuple[int, ...],
    samples: bool,
) -> Seen:
    """Return ``before`` renewed: ``updates`` led to where ``h`` is ``values`` and the steps are ``residual`` from it."""
    if before is None:
        unknown = torch.full_like(residual, math.inf)
        return Seen(values, unknown, unknown)
    if before.values is None:
        return Seen(values, before.gains, before.effects)
    passed = compared(values, before.values, contract, samples=samples).units
    gains = observed_gains(passed, updates, before.gains, floor, distances)
    return Seen(values, gains, observed_gains(residual, updates, before.effects, floor, distances))


def scan_diagonal(system: System, states: States, values: States, diagonal: tuple[torch.Tensor | None, ...]) -> States:
    """Return ``s_t = h_t(s^k) + D_t (s_{t-d} - s^k_{t-d})`` by one scan a component; ``values`` where there is no D.

    It starts from the steps that are final to the bit.
    """
    read = windows(system, states)
    exact = min(system.steps, leading(~changed_steps(values, states)) + system.nearest)
    result: list[torch.Tensor] = []
    for component, (value, factor) in enumerate(zip(values, diagonal, strict=True)):
        if factor is None:
            result.append(value)
            continue
        index = nearest_carry(system, component)
        factor[:exact] = 0
        result.append(affine_scan(factor, value - factor * read[index], system.carries[index].distance))
    return tuple(result)


def flattened(states: States, batch: int) -> torch.Tensor:
    """Return the floating-point components of each sample's state side by side, (T, batch, N)."""
    parts = [s.reshape(s.shape[0], batch, -1) for s in states if s.is_floating_point()]
    return torch.cat(parts, dim=2)


def unflattened(flat: torch.Tensor, like: States) -> States:
    """Undo :func:`flattened`; other components come from ``like``."""
    result: list[torch.Tensor] = []
    offset = 0
    for value in like:
        if not value.is_floating_point():
            result.append(value)
            continue
        size = value[0].numel() // flat.shape[1]
        result.append(flat[:, :, offset : offset + size].reshape(value.shape))
        offset += size
    return tuple(result)
