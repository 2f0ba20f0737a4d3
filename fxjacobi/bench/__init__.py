"""``fxjacobi bench``: both runs of a model, measured side by side in one process."""

from __future__ import annotations

from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.bench.runner import run
from fxjacobi.bench.suite import DEVICE_SUITE, EVERYTHING, SUITE

__all__ = ["DEVICE_SUITE", "EVERYTHING", "SUITE", "Benchmark", "Row", "Settings", "run"]
