"""GS-Jacobi: Jacobi inside a window of steps, Gauss-Seidel from window to window."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.sweep import started, sweep

if TYPE_CHECKING:
    import torch

    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["Windowed"]


@dataclass(frozen=True)
class Windowed(Method):
    """Jacobi sweeps over ``window`` steps from the exact prefix on (arXiv 2002.03629, section 4.2, Jacobi-GS variants).

    ``sliding``: the window starts where the exact prefix ends, and moves on when half of it is final. Otherwise the steps are cut into
    fixed blocks, and the next block starts when every step of the one before is final. Memory is that of ``window``
    steps, and guesses far from final values cost nothing.

    Raises:
        ValueError: The window is not positive.
    """

    keeps_bits: ClassVar[bool] = True

    window: int = 128
    sliding: bool = True

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"a window holds at least 1 step, not {self.window}")

    @override
    def applies(self, loop: Loop) -> bool:
        return True

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        return started(system, guess, memory=0)

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        seen: int = iterate.memory
        final = min(iterate.prefix, seen)
        stop = min(system.steps, final + self.window) if self.moves_on(iterate) else seen
        return replace(sweep(system, iterate, contract, stop, seen), memory=stop)

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.update == 0.0 if contract.exact else iterate.update <= 1.0

    @override
    def of_samples(self, system: System, iterate: Iterate, samples: torch.Tensor) -> Iterate | None:
        return iterate

    @override
    def moves_on(self, iterate: Iterate) -> bool:
        seen: int = iterate.memory
        return seen - min(iterate.prefix, seen) <= self._hop

    @property
    def _hop(self) -> int:
        # A window that moved by single steps would always hold guesses that no sweep has touched.
        return self.window // 2 if self.sliding else 0
