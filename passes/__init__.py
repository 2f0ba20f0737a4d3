"""The compiler's passes, in order. Each is one file, named as the pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fxjacobi.passes.batch_equations import BatchEquations
from fxjacobi.passes.canonicalize import Canonicalize
from fxjacobi.passes.collapse_sampling import CollapseSampling
from fxjacobi.passes.collapse_writes import CollapseWrites
from fxjacobi.passes.eliminate import Eliminate
from fxjacobi.passes.emit_solvers import EmitSolvers
from fxjacobi.passes.fold_additions import FoldAdditions
from fxjacobi.passes.group_draws import GroupDraws
from fxjacobi.passes.guards_first import GuardsFirst
from fxjacobi.passes.hoist_random import HoistRandom
from fxjacobi.passes.places_to_writes import PlacesToWrites
from fxjacobi.passes.prefixes_to_writes import PrefixesToWrites
from fxjacobi.passes.repeated_masks import RepeatedMasks
from fxjacobi.passes.roll_loops import RollLoops
from fxjacobi.passes.script_loops import ScriptLoops
from fxjacobi.passes.split_components import SplitComponents
from fxjacobi.passes.stop_early import StopEarly

if TYPE_CHECKING:
    from fxjacobi.options import Options
    from fxjacobi.passes.base import Pass

__all__ = ["pipeline"]


def pipeline(options: Options, *, gradients: bool) -> tuple[Pass, ...]:
    """The passes from a captured graph to the emitted module, in order.

    Before :class:`ScriptLoops`, :mod:`fxjacobi.choose` times the methods of each recurrence that is left: that needs
    the run's own operands, which a pass does not have.
    """
    return (
        Canonicalize(gradients=gradients, exact=options.exact),
        HoistRandom(),
        Eliminate(),
        RepeatedMasks(),
        GuardsFirst(),
        PrefixesToWrites(),
        PlacesToWrites(),
        RollLoops(),
        FoldAdditions(exact=options.exact),
        SplitComponents(),
        CollapseWrites(),
        CollapseSampling(
            collapse=options.method != "sequential",
            windowed=options.method == "windowed",
            exact=options.exact,
            measure=options.measure,
            memory_limit=options.memory_limit,
        ),
        StopEarly(),
        BatchEquations(exact=options.exact),
        ScriptLoops(),
        GroupDraws(),
        EmitSolvers(),
    )
