"""``fxjacobi demo``: third-party sampling code, unmodified, run both ways on handwritten digits."""

from __future__ import annotations

from fxjacobi.demo.job import DemoError, Outcome
from fxjacobi.demo.run import run

__all__ = ["DemoError", "Outcome", "run"]
