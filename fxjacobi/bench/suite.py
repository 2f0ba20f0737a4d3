"""Every benchmark, in the order in which they run; the slow ones last."""

from __future__ import annotations

from fxjacobi.bench.capture_cost import CaptureCost, CompileTime
from fxjacobi.bench.flow_inverse import FlowInverse
from fxjacobi.bench.overhead import Overhead

__all__ = ["SUITE"]

SUITE = (FlowInverse(), Overhead(), CaptureCost(), CompileTime())
