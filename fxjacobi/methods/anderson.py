"""Triangular Anderson acceleration of Jacobi sweeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from fxjacobi.methods.linearised import advance, flattened, has_float_state, unflattened
from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.settle import replace_non_finite

if TYPE_CHECKING:
    from fxjacobi.footprint import StateSize
    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["Anderson"]


@dataclass(frozen=True, slots=True)
class _History:
    """The last sweeps' states and residuals, newest last, each (T, 1, N)."""

    states: tuple[torch.Tensor, ...] = ()
    residuals: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Anderson(Method):
    """``s_t = h_t - sum_j gamma_{t,j} (dS_{t,j} + dR_{t,j})``, where ``gamma_t`` fits the residuals of steps ``<= t``.

    ParaTAA (arXiv 2402.09970, section 3.3): least squares over the last ``history`` differences of states ``dS`` and
    residuals ``dR = d(h - s)``, cumulative along ``t``, so that no step's update reads a later step's residual and the
    prefix that is right stays right.

    Raises:
        ValueError: ``history`` is not positive, or ``regularisation`` is negative.
    """

    keeps_bits: ClassVar[bool] = False

    history: int = 3
    regularisation: float = 1e-6

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"history must be at least 1, not {self.history}")
        if self.regularisation < 0:
            raise ValueError(f"regularisation must be at least 0, not {self.regularisation}")

    @override
    def applies(self, loop: Loop) -> bool:
        return has_float_state(loop)

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        return Iterate(replace_non_finite(guess, system.base(), 0), memory=_History())

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        history: _History = iterate.memory
        values = system.next_states(iterate.states)
        flat, at = flattened(iterate.states, 1), flattened(values, 1)
        residual = at - flat
        keep = self.history + 1
        states, residuals = (*history.states, flat)[-keep:], (*history.residuals, residual)[-keep:]
        proposal = values
        if len(states) > 1:
            moved = torch.cat([b - a for a, b in pairwise(states)], dim=1)  # (T, m, N)
            changed = torch.cat([b - a for a, b in pairwise(residuals)], dim=1)
            gamma = self._coefficients(changed, residual)
            proposal = unflattened(at - (gamma.unsqueeze(-1) * (moved + changed)).sum(1, keepdim=True), values)
        iterate = advance(system, iterate, contract, values, proposal, second_order=False, combines=True)
        return replace(iterate, memory=_History(states, residuals))

    def _coefficients(self, changed: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return ``gamma`` (T, m): least squares of ``residual`` (T, 1, N) by ``changed`` (T, m, N) over steps <= t."""
        # Squares of float32 residuals lose half the digits: the small normal equations are kept in float64.
        rows, target = changed.double(), residual.double()
        gram = (rows @ rows.mT).cumsum(0)
        right = (rows @ target.mT).cumsum(0)
        size = gram.diagonal(dim1=1, dim2=2).mean(1)
        ridge = (self.regularisation * size + torch.finfo(torch.float64).tiny).reshape(-1, 1, 1)
        identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        solution, info = torch.linalg.solve_ex(gram + ridge * identity, right)
        usable = (info == 0) & torch.isfinite(solution).flatten(1).all(1)
        coefficients = torch.where(usable.reshape(-1, 1), solution.squeeze(-1), torch.zeros_like(solution.squeeze(-1)))
        return coefficients.to(changed.dtype)

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.update <= 1.0

    @override
    def of_samples(self, system: System, iterate: Iterate, samples: torch.Tensor) -> Iterate | None:
        history: _History = iterate.memory

        def some(flat: torch.Tensor) -> torch.Tensor:
            return flattened(tuple(s.index_select(1, samples) for s in unflattened(flat, iterate.states)), 1)

        part = _History(tuple(map(some, history.states)), tuple(map(some, history.residuals)))
        return replace(iterate, memory=part)

    @override
    def moved(self, before: Iterate, after: Iterate) -> tuple[States, States] | None:
        # A combination may stay where it is, and the equations may not hold there.
        return None if after.seen is None or after.seen.values is None else (after.seen.values, before.states)

    @override
    def bytes_per_step(self, loop: Loop, size: StateSize) -> int:
        # Two histories, their differences, and these in float64.
        return (2 + 2 + 2 * 2) * (self.history + 1) * size.bytes + size.bytes
