"""Every benchmark, in the order in which they run; the slow ones last."""

from __future__ import annotations

from fxjacobi.bench.capture_cost import CaptureCost, CompileTime
from fxjacobi.bench.flow_inverse import FlowInverse
from fxjacobi.bench.overhead import Overhead
from fxjacobi.bench.recurrences import Recurrences
from fxjacobi.bench.sampling import MadeSampling, PixelCnnSampling, TransformerSampling

__all__ = ["SUITE"]

SUITE = (
    FlowInverse(),
    Overhead(),
    MadeSampling(),
    Recurrences(),
    CaptureCost(),
    TransformerSampling(),
    PixelCnnSampling(),
    CompileTime(),
)
