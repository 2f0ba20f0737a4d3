"""fxjacobi: sequential PyTorch computation, solved in parallel, with exactly the sequential outputs."""

from __future__ import annotations

from fxjacobi.api import compile, explain  # noqa: A004 - the name that torch's users expect
from fxjacobi.errors import (
    CaptureError,
    CaptureWarning,
    ExactnessError,
    ExactnessWarning,
    FxjacobiError,
    PassError,
    PlanError,
)
from fxjacobi.module import SolvedModule
from fxjacobi.plan import Plan
from fxjacobi.scan import scan
from fxjacobi.verify import verify

__all__ = [
    "CaptureError",
    "CaptureWarning",
    "ExactnessError",
    "ExactnessWarning",
    "FxjacobiError",
    "PassError",
    "Plan",
    "PlanError",
    "SolvedModule",
    "compile",
    "explain",
    "scan",
    "verify",
]

__version__ = "0.1.0"
