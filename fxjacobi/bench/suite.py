"""Every benchmark, in the order in which they run; the slow ones last."""

from __future__ import annotations

from fxjacobi.bench.analysis_cost import AnalysisCost
from fxjacobi.bench.capture_cost import CaptureCost, CompileTime
from fxjacobi.bench.convergence import Convergence
from fxjacobi.bench.device_flow import DeviceFlow
from fxjacobi.bench.device_recurrences import DeviceGru, DeviceLstm
from fxjacobi.bench.device_sampling import (
    DeviceMade784,
    DeviceMade3072,
    DevicePixelCnnCifar,
    DevicePixelCnnCifarCompiled,
    DevicePixelCnnMnist,
    DevicePixelCnnMnistCompiled,
)
from fxjacobi.bench.diffusion import Diffusion
from fxjacobi.bench.flow_inverse import FlowInverse
from fxjacobi.bench.guesses import Guesses
from fxjacobi.bench.overhead import Overhead
from fxjacobi.bench.paper import Paper
from fxjacobi.bench.recurrences import Recurrences
from fxjacobi.bench.sampling import (
    MadeInpainting,
    MadeSampling,
    PixelCnnInpainting,
    PixelCnnSampling,
    TransformerSampling,
)
from fxjacobi.bench.speedups import Speedups

__all__ = ["DEVICE_SUITE", "EVERYTHING", "SUITE"]

SUITE = (
    FlowInverse(),
    Overhead(),
    MadeSampling(),
    MadeInpainting(),
    Paper(),
    Guesses(),
    Convergence(),
    Diffusion(),
    Speedups(),
    Recurrences(),
    CaptureCost(),
    AnalysisCost(),
    TransformerSampling(),
    PixelCnnSampling(),
    PixelCnnInpainting(),
    CompileTime(),
)
"""What runs by default on the CPU."""

DEVICE_SUITE = (
    DeviceGru(),
    DeviceMade784(),
    DeviceFlow(),
    DevicePixelCnnMnist(),
    DeviceMade3072(),
    DevicePixelCnnCifar(),
    DeviceLstm(),
)
"""What runs by default on a CUDA device: pieces with a share of time each, less than 9 minutes together."""

EVERYTHING = (*SUITE, *DEVICE_SUITE, DevicePixelCnnMnistCompiled(), DevicePixelCnnCifarCompiled())
"""The last two wait minutes for torch.compile, and run only where they are named."""
