"""What the methods that solve a linear system each sweep share: the step from old iterate and proposal to the new."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.loops import Carried
from fxjacobi.methods.associative_scan import affine_scan
from fxjacobi.methods.comparison import compared
from fxjacobi.methods.jacobian import nearest_carry, windows
from fxjacobi.methods.settle import (
    changed_steps,
    geometric_remainder,
    leading,
    observed_ratios,
    replace_non_finite,
)

if TYPE_CHECKING:
    from fxjacobi.loops import Loop
    from fxjacobi.methods.method import Contract, Iterate
    from fxjacobi.system import States, System

__all__ = ["advance", "flattened", "has_float_state", "scan_diagonal", "unflattened"]


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
) -> Iterate:
    """Return the iterate whose trajectory is ``proposal``, given ``values = h(iterate.states)``.

    Steps whose inputs are final to the bit take ``values``: so these methods, too, reach the answer in ``T`` sweeps at
    most. All others take the proposal, those of the prefix that rounding still moves included: from where it is not
    taken, what these roundings add up to would be missing. Where the proposal is not finite it is replaced by
    ``values``, then by the base values.

    Args:
        system: The equations.
        iterate: Where the sweep started.
        contract: The tolerance that updates are measured in.
        values: ``h`` of its trajectory.
        proposal: What the method makes of it.
        second_order: Whether the update itself estimates the error of the old iterate, amplification by later steps
            included, as a Newton update does; otherwise equal ratios of successive updates must not add up to more
            than the tolerance either.
        rounded: How many times more than by one evaluation's rounding the steps of a proposal move that adds values of
            earlier steps up, (T,); updates within it, and within the tolerance, are taken for rounding.
        lands: Whether a proposal gets to where it goes. A damped one goes a part of the way, and to a state of zero, where
            no update is small, never: there all steps whose inputs are final within rounding take ``values``.
    """
    base = system.base()
    against = compared(values, iterate.states, contract)
    floor = against.floor if rounded is None else (against.floor * rounded).minimum(against.floor.clamp_min(1.0))
    prefix, exact = (
        min(system.steps, leading(final) + system.nearest) for final in (against.settled, against.units == 0)
    )
    exact = exact if lands else prefix
    fallback = replace_non_finite(values, base, exact)
    new = tuple(torch.cat([v[:exact], p[exact:]]) for v, p in zip(values, proposal, strict=True))
    new = replace_non_finite(new, fallback, exact)
    updates = compared(new, iterate.states, contract).units
    update = float(updates.amax())
    earlier = iterate.updates if iterate.updates is not None else torch.zeros_like(updates)
    ratios = iterate.gains if iterate.gains is not None else torch.full_like(updates, math.inf)
    ratios = observed_ratios(updates, earlier, ratios, floor)
    if update <= 1.0 and not second_order:
        update = max(update, geometric_remainder(updates, ratios, floor))
    if prefix == system.steps:
        update = 0.0
    update = math.inf if math.isnan(update) else update
    return replace(iterate, states=new, prefix=prefix, update=update, updates=updates, gains=ratios)


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
