"""script_loops: run what is left of loops in order without Python between their operations.

Fires on every loop that no earlier pass has put a solver in the place of and that repeats at least four times::

    before                            after
    loop_1 = self.loop_1(h, w)        loop_1 = self.loop_1(h, w)      # the same operands, a ScriptedLoop

On a device whose work can be captured, it becomes :class:`fxjacobi.device.step_graphs.StepGraphs` instead.

Must not fire where TorchScript cannot express the body (random draws, shapes that depend on data, other blocks in it): such a
loop stays as it is. The operations and their order are the loop's own, so the bits are too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fxjacobi.device.step_graphs import step_graphs
from fxjacobi.passes.base import Pass, PassResult
from fxjacobi.passes.replace_blocks import replace_blocks
from fxjacobi.scripted_loop import ScriptedLoop, scripted_steps

if TYPE_CHECKING:
    from torch import fx, nn

    from fxjacobi.loops import Loop

__all__ = ["ScriptLoops"]

_SHORTEST = 4
"""Steps under which compiling the text is not worth it."""


def _scripted(loop: Loop, _: fx.Node) -> nn.Module:
    captured = step_graphs(loop) if loop.trip_count >= _SHORTEST else None
    if captured is not None:
        return captured
    return ScriptedLoop(loop) if loop.trip_count >= _SHORTEST and scripted_steps(loop) is not None else loop


@dataclass(frozen=True)
class ScriptLoops(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "script_loops"

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Replace the loops, the innermost first."""
        return replace_blocks(module, _scripted)
