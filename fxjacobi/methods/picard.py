"""Picard iteration: each step adds its increment, evaluated at the old iterate, to the step before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from fxjacobi.methods.jacobian import nearest_carry
from fxjacobi.methods.linearised import advance, has_float_state, scan_diagonal
from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.settle import replace_non_finite

if TYPE_CHECKING:
    from fxjacobi.footprint import StateSize
    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["Picard"]


@dataclass(frozen=True)
class Picard(Method):
    """``s_t = s_{t-d} + (h_t(s^k_{t-d}) - s^k_{t-d})``, a prefix sum of increments (ParaDiGMS, arXiv 2305.16317, eq. 4).

    Newton with the identity for a Jacobian: for chains of small increments (samplers, ODE steps, residual layers). Not for
    tolerances near the dtype's precision: the sum carries the rounding of all steps along, some ``sqrt(T)`` epsilons.
    """

    keeps_bits: ClassVar[bool] = False

    @override
    def applies(self, loop: Loop) -> bool:
        return has_float_state(loop)

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        return Iterate(replace_non_finite(guess, system.base(), 0))

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        values = system.next_states(iterate.states)
        identity: list[torch.Tensor | None] = []
        for component, value in enumerate(values):
            one = None
            if value.is_floating_point():
                one = torch.ones_like(value, memory_format=torch.contiguous_format)
                one[: system.carries[nearest_carry(system, component)].distance] = 0
            identity.append(one)
        proposal = scan_diagonal(system, iterate.states, values, tuple(identity))
        return advance(
            system, iterate, contract, values, proposal, second_order=False, rounded=_rounded(iterate.states)
        )

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.update <= 1.0

    @override
    def of_samples(self, system: System, iterate: Iterate, samples: torch.Tensor) -> Iterate | None:
        return iterate

    @override
    def bytes_per_step(self, loop: Loop, size: StateSize) -> int:
        return 5 * size.bytes


def _rounded(states: States) -> torch.Tensor:
    """Return by how much the rounding of a sum of increments outweighs one step's: ``|(|s_0|, .., |s_t|)| / |s_t|``, (T,)."""
    result = torch.ones(states[0].shape[0], dtype=torch.float64)
    for value in states:
        if value.is_floating_point():
            size = torch.linalg.vector_norm(value.reshape(value.shape[0], -1), math.inf, 1).double().cpu()
            total = size.square().cumsum(0).sqrt()
            result = torch.maximum(result, torch.where(size > 0, total / size, 1.0))
    return torch.where(torch.isfinite(result), result, 1.0)
