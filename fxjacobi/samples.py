"""Random operands of the real shapes, dtypes and layouts for a loop that is measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi import ops
from fxjacobi.graph import Spec, TensorSpec
from fxjacobi.loops import Invariant, Loop
from fxjacobi.placement import placed_empty

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["sample", "sample_operands"]

_SPECIAL = (math.inf, -math.inf, math.nan, -0.0, 1e-40, 88.0, -104.0)


def sample_operands(
    loop: Loop, operands: Sequence[Spec | torch.Tensor], seed: int, phases: Sequence[int] = ()
) -> list[torch.Tensor]:
    """Return one random tensor an operand; known tensors as they are, moved by nothing.

    Matrices that all steps share are scaled as weights are, so that what follows them does not saturate, where
    roundings hide. From seed 1 on, an element in two hundred of what changes from step to step is special (infinite,
    NaN, a signed zero, subnormal, at the edge of the exponential). ``phases`` are the operands' distances from an
    aligned address (:func:`fxjacobi.placement.phase_of`), 0 where none is given.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = {b.operand for b in loop.bindings if isinstance(b, Invariant)}
    samples = []
    for index, operand in enumerate(operands):
        if isinstance(operand, torch.Tensor):
            samples.append(operand.detach())
        elif isinstance(operand, TensorSpec):
            drawn = _sample(operand, generator, shared=index in shared, special=seed > 0)
            phase = phases[index] if index < len(phases) else 0
            samples.append(placed_empty(drawn, phase).copy_(drawn) if phase else drawn)
        else:
            raise TypeError(f"operand {index} is no tensor")
    return samples


def sample(spec: TensorSpec, seed: int) -> torch.Tensor:
    """Return one random tensor."""
    return _sample(spec, torch.Generator().manual_seed(seed), shared=False, special=False)


def _sample(spec: TensorSpec, generator: torch.Generator, *, shared: bool, special: bool) -> torch.Tensor:
    shape, dtype = spec.shape, spec.dtype
    value: Any
    if dtype.is_complex or dtype.is_floating_point:
        wide = torch.float64 if dtype.is_floating_point else torch.complex128
        value = torch.randn(shape, generator=generator, dtype=wide)
        if shared and len(shape) > 1:
            value /= math.sqrt(max(shape[-1], shape[-2]))
        elif special and dtype.is_floating_point:
            chosen = torch.rand(shape, generator=generator) < 0.005
            number = torch.randint(len(_SPECIAL), shape, generator=generator)
            value = torch.where(chosen, torch.tensor(_SPECIAL, dtype=wide)[number], value)
    else:
        # Small enough to index with, whatever they index.
        value = torch.randint(0, 2, shape, generator=generator)
    return ops.restride(value.to(dtype=dtype, device=spec.device), spec.stride)
