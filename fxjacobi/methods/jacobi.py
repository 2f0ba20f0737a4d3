"""Jacobi: all equations past the exact prefix at once, sweep after sweep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.sweep import started, sweep

if TYPE_CHECKING:
    import torch

    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["Jacobi"]


@dataclass(frozen=True)
class Jacobi(Method):
    """``s_t^{k+1} = h_t(s_{t-d}^k)`` for all ``t`` at once (arXiv 2002.03629, Algorithm 1).

    At most T sweeps, as many as the dependence graph is deep. Steps inside the exact prefix are not evaluated again.
    Pays where few sweeps do: shallow dependences, discrete values, strong contraction.
    """

    keeps_bits: ClassVar[bool] = True

    @override
    def applies(self, loop: Loop) -> bool:
        return True

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        return started(system, guess)

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        return sweep(system, iterate, contract, system.steps, system.steps)

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.update == 0.0 if contract.exact else iterate.update <= 1.0

    @override
    def of_samples(self, system: System, iterate: Iterate, samples: torch.Tensor) -> Iterate | None:
        return iterate
