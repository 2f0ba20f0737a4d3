"""What the last call did, block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fxjacobi.certificate import Certificate

__all__ = ["BlockReport", "Report"]


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One block's solve: its name, method, number of equations and what the solve needed.

    ``active`` says, for each sweep, how many samples of the batch it ran, where samples are known to be independent, so
    that those that are final are left out; ``window`` how many steps were solved together at most, where memory did not
    allow all.
    """

    name: str
    method: str
    equations: int
    sweeps: int
    certificate: Certificate | None = None
    prefixes: tuple[int, ...] = ()
    residual: float | None = None
    active: tuple[int, ...] = ()
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """One call: whether the emitted module ran (``solved``), and why not otherwise."""

    solved: bool
    reason: str
    blocks: tuple[BlockReport, ...] = ()

    @property
    def sweeps(self) -> int:
        """The largest number of sweeps that a block took."""
        return max((block.sweeps for block in self.blocks), default=0)
