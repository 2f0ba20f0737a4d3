"""Where a tensor lies in memory: its strides, and how far past an aligned address it starts.

The bits of a result may depend on both. Measured on the CPU (torch 2.13, AVX512; float32, float64, bfloat16): matrix and
dot products round otherwise when an operand's address changes modulo 16 bytes, and not by anything coarser; elementwise
functions, reductions, softmax and normalisation do not look at the address.
"""

from __future__ import annotations

import torch
from torch._C._functorch import is_functorch_wrapped_tensor

__all__ = ["alignment", "phase_of", "placed_copy", "placed_empty", "rounding_phase", "rounding_unit"]

_ROUNDING_BYTES = 16  # what the bits of a result on the CPU were seen to depend on; see the module's docstring

# Not ``Tensor.data_ptr``, which a recording watches (fxjacobi.capture).
_data_ptr = torch._C.TensorBase.data_ptr


def alignment(device: torch.device) -> int:
    """Bytes to which torch's allocator aligns every new tensor on ``device``, at least."""
    return 64 if device.type == "cpu" else 256


def phase_of(tensor: torch.Tensor) -> int:
    """Bytes from the last multiple of :func:`alignment` to the first element of ``tensor``; 0 for a new tensor."""
    return _data_ptr(tensor) % alignment(tensor.device)


def rounding_unit(device: torch.device) -> int:
    """Bytes modulo which a kernel on ``device`` may round by its arguments' addresses."""
    return _ROUNDING_BYTES if device.type == "cpu" else alignment(device)


def rounding_phase(tensor: torch.Tensor) -> int:
    """The part of :func:`phase_of` that kernels may round by."""
    return _data_ptr(tensor) % rounding_unit(tensor.device)


def placed_empty(like: torch.Tensor, phase: int | None = None) -> torch.Tensor:
    """Return an uninitialised tensor with ``like``'s strides that starts as far from an aligned address as ``like``.

    Where strides leave gaps, so do the new tensor's; where they repeat one element (``expand``), it is a plain one.

    Args:
        like: Shape, strides, dtype and device.
        phase: Bytes past an aligned address, instead of ``like``'s.
    """
    phase = phase_of(like) if phase is None else phase
    repeats = any(step == 0 and size > 1 for size, step in zip(like.shape, like.stride(), strict=True))
    if repeats or like.numel() == 0:
        return torch.empty_like(like)
    if phase == 0:
        plain = torch.empty_like(like)
        if plain.stride() == like.stride():
            return plain
    begin = phase // like.element_size()
    span = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True))
    memory = torch.empty(begin + span, dtype=like.dtype, device=like.device)
    if like.is_contiguous():
        return memory[begin:].view(like.shape)
    return memory.as_strided(like.shape, like.stride(), begin)


def placed_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``tensor`` that lies as it does; a plain copy inside a transform of ``torch.func``."""
    if is_functorch_wrapped_tensor(tensor):
        return tensor.clone()
    return placed_empty(tensor).copy_(tensor)
