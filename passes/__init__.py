"""The compiler's passes. Each is one file, named as the pass."""

import importlib
from typing import Any


def pipeline(options: Any, *, gradients: bool) -> Any:
    """Temporary: the passes that exist so far."""
    found = []
    for module, name, fields in (
        ("canonicalize", "Canonicalize", {"gradients": gradients, "exact": options.exact}),
        ("hoist_random", "HoistRandom", {}),
        ("eliminate", "Eliminate", {}),
        ("roll_loops", "RollLoops", {}),
        ("split_components", "SplitComponents", {}),
        ("collapse_writes", "CollapseWrites", {}),
        ("collapse_sampling", "CollapseSampling", {}),
        ("stop_early", "StopEarly", {}),
        ("batch_equations", "BatchEquations", {"exact": options.exact}),
        ("emit_solvers", "EmitSolvers", {}),
    ):
        try:
            found.append(getattr(importlib.import_module(f"fxjacobi.passes.{module}"), name)(**fields))
        except ModuleNotFoundError:
            continue
    return tuple(found)
