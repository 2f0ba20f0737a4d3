"""Quasi-Newton: only the diagonal of the Jacobian, so that the scan is elementwise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from fxjacobi.footprint import row_bytes
from fxjacobi.methods.jacobian import batch_size, diagonals, windows
from fxjacobi.methods.linearised import advance, has_float_state, scan_diagonal
from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.settle import replace_non_finite

if TYPE_CHECKING:
    import torch

    from fxjacobi.footprint import StateSize
    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["QuasiNewton"]


@dataclass(frozen=True)
class QuasiNewton(Method):
    """``s_t = h_t(s^k_{t-d}) + D_t * (s_{t-d} - s^k_{t-d})``, ``D_t = diag J_t`` (quasi-DEER, arXiv 2407.19115, sec. 4).

    Memory and work as a Jacobi sweep's, times the products that find the diagonal: ``probes`` random ones
    (an estimate), or with ``probes=0`` one for each element of a sample's state (exact).

    Raises:
        ValueError: ``probes`` is negative.
    """

    keeps_bits: ClassVar[bool] = False

    probes: int = 0

    def __post_init__(self) -> None:
        if self.probes < 0:
            raise ValueError(f"probes must be at least 0, not {self.probes}")

    @override
    def applies(self, loop: Loop) -> bool:
        return has_float_state(loop)

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        return Iterate(replace_non_finite(guess, system.base(), 0), memory=batch_size(system))

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        values = system.next_states(iterate.states)
        diagonal = diagonals(system, windows(system, iterate.states), iterate.memory, self.probes)
        proposal = scan_diagonal(system, iterate.states, values, diagonal)
        return advance(system, iterate, contract, values, proposal, second_order=False)

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.update <= 1.0

    @override
    def of_samples(self, system: System, iterate: Iterate, samples: torch.Tensor) -> Iterate | None:
        return replace(iterate, memory=samples.shape[0]) if iterate.memory > 1 else None

    @override
    def bytes_per_step(self, loop: Loop, size: StateSize) -> int:
        return 7 * size.bytes + row_bytes(loop)
