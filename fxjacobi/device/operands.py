"""A call's operands at fixed addresses: what a captured program reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxjacobi.bits import same_bits
from fxjacobi.device.runner import Refused

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["ALIGNMENT", "StaticOperands", "copied", "layout_of", "phase_of", "static_like"]

ALIGNMENT = 64
"""Bytes: kernels are chosen by how operands are aligned, so a static buffer is aligned as what it stands for is."""

_CONSTANT = 64  # elements of a host tensor that is held as a constant

Layout = tuple[torch.Size, tuple[int, ...], torch.dtype, int]


def phase_of(tensor: torch.Tensor) -> int:
    """Return how many bytes ``tensor`` starts after a multiple of :data:`ALIGNMENT`."""
    return tensor.data_ptr() % ALIGNMENT


def layout_of(tensor: torch.Tensor) -> Layout:
    """Return all that a kernel can tell two tensors of the same values apart by."""
    return tensor.shape, tensor.stride(), tensor.dtype, phase_of(tensor)


def static_like(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return new memory with the layout of ``tensor``, its values undefined; ``None`` where elements overlap.

    Dimensions of stride 0 are one element in memory, as in ``tensor``: write to :func:`_memory_of` of it.
    """
    part = _memory_of(tensor)
    span = 1 + sum((size - 1) * step for size, step in zip(part.shape, part.stride(), strict=True))
    strides = sorted((step, size) for size, step in zip(part.shape, part.stride(), strict=True) if size > 1)
    reach = 1
    for step, size in strides:
        if step < reach:
            return None
        reach = step * (size - 1) + reach
    if part.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    skipped = phase_of(tensor) // tensor.element_size()
    memory = torch.empty(skipped + span, dtype=tensor.dtype, device=tensor.device)
    return memory.as_strided(tensor.shape, tensor.stride(), skipped)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's values in memory of their own, with its strides: what comes next may round by them."""
    copy = tensor.clone()
    if copy.stride() == tensor.stride():
        return copy
    strided = static_like(tensor)
    if strided is None:
        return copy
    _memory_of(strided).copy_(_memory_of(tensor))
    return strided


def _memory_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` without the repetitions of its expanded dimensions."""
    part = tensor
    for dim, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if step == 0 and size > 1:
            part = part.narrow(dim, 0, 1)
    return part


class StaticOperands:
    """The operands of one call, and of all later calls whose operands are laid out in the same way.

    Parameters are read where they are: their memory stays the same from call to call (an optimizer writes in place), and
    where it does not, the operands no longer fit. Everything else on the device is copied into a static buffer by
    :meth:`load`. Small host tensors and Python values are part of the capture, so a call with others does not fit.

    Args:
        operands: The call's operands.
        device: The device of the capture.
        streamed: Operands that are not copied: the program's owner copies parts of them itself.

    Attributes:
        values: What programs read, in the order of the operands; for streamed ones, the tensors of the call loaded last.
    """

    def __init__(self, operands: Sequence[Any], device: torch.device, streamed: Collection[int] = ()) -> None:
        self.device = device
        self.streamed = frozenset(streamed)
        self.values: list[Any] = []
        self._copied: list[int] = []
        self._live: list[int] = []
        self._baked: list[int] = []
        for index, operand in enumerate(operands):
            self.values.append(self._adopt(index, operand))
        self._layouts = {i: layout_of(operands[i]) for i in (*self._copied, *self._live, *self.streamed)}

    @staticmethod
    def refusal(operands: Sequence[Any], device: torch.device) -> Refused | None:
        """Return why ``operands`` cannot be static, or ``None`` where they can."""
        for index, operand in enumerate(operands):
            if not isinstance(operand, torch.Tensor):
                continue
            if operand.layout is not torch.strided or operand.is_conj() or operand.is_neg():
                return Refused(f"operand {index} is not a plain strided tensor")
            if operand.device != device:
                if operand.device.type != "cpu" or operand.numel() > _CONSTANT:
                    return Refused(f"operand {index} is on {operand.device}, others on {device}")
            elif static_like(operand) is None:
                return Refused(f"elements of operand {index} share memory")
        return None

    def _adopt(self, index: int, operand: Any) -> Any:
        if not isinstance(operand, torch.Tensor):
            self._baked.append(index)
            return operand
        if operand.device != self.device:
            self._baked.append(index)
            return operand.detach().clone()
        if index in self.streamed:
            return operand.detach()
        if isinstance(operand, nn.Parameter):
            self._live.append(index)
            return operand.detach()
        self._copied.append(index)
        buffer = static_like(operand)
        assert buffer is not None, "refusal() was asked"
        return buffer

    def fits(self, operands: Sequence[Any]) -> bool:
        """Whether programs captured for these operands may serve a call with ``operands``."""
        if len(operands) != len(self.values):
            return False
        for index in self._baked:
            if not _same(operands[index], self.values[index]):
                return False
        for index, layout in self._layouts.items():
            operand = operands[index]
            if not isinstance(operand, torch.Tensor) or operand.device != self.device or layout_of(operand) != layout:
                return False
        return all(operands[index].data_ptr() == self.values[index].data_ptr() for index in self._live)

    def load(self, operands: Sequence[Any]) -> None:
        """Copy the call's values into the static buffers, on the current stream."""
        for index in self.streamed:
            self.values[index] = operands[index].detach()
        targets = [_memory_of(self.values[index]) for index in self._copied]
        if targets:
            torch._foreach_copy_(targets, [_memory_of(operands[index].detach()) for index in self._copied])


def _same(operand: Any, value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return isinstance(operand, torch.Tensor) and operand.device == value.device and same_bits(operand, value)
    return type(operand) is type(value) and bool(operand == value)
