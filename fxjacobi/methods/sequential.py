"""Gauss-Seidel: the steps in their ordinary order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from fxjacobi.methods.method import Contract, Iterate, Method

if TYPE_CHECKING:
    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["Sequential"]


@dataclass(frozen=True)
class Sequential(Method):
    """``s_t = h_t(s_{t-d})``, one ``t`` after another: the definition, and every other method's last resort.

    It knows nothing and sweeps nothing: the driver completes from the empty prefix.
    """

    keeps_bits: ClassVar[bool] = True

    @override
    def applies(self, loop: Loop) -> bool:
        return True

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        return Iterate(states=guess)

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        return iterate

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return False
