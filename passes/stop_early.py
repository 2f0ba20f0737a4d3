"""stop_early: a loop that applies one function again and again stops when its state comes back.

Fires on every loop of :attr:`fxjacobi.loops.Kind.FIXED_POINT` (carries and invariants only) of at least two steps,
loops in bodies and submodules included::

    before                                            after
    fixed_point_0 = self.fixed_point_0(w, x)          the same call, of a FixedPoint

Must not fire where anything else changes from step to step (a scan, a table, a literal), nor on bodies that draw random
numbers. No proof is needed: a state that repeats bit for bit repeats for ever, and so do the guards on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fxjacobi.equations import draws
from fxjacobi.fixed_point import FixedPoint
from fxjacobi.loops import Kind, Loop
from fxjacobi.passes.base import Pass, PassResult
from fxjacobi.passes.replace_blocks import replace_blocks

if TYPE_CHECKING:
    from torch import fx

__all__ = ["StopEarly"]


def _stops(loop: Loop, _node: fx.Node) -> Loop | FixedPoint:
    if loop.kind is Kind.FIXED_POINT and loop.trip_count >= 2 and not draws(loop.body):
        return FixedPoint(loop)
    return loop


@dataclass(frozen=True)
class StopEarly(Pass):
    """Fixed-point iterations stop at the first exact repeat of their state."""

    name: ClassVar[str] = "stop_early"

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Wrap every fixed-point loop."""
        return replace_blocks(module, _stops)
