"""Derivatives of the stacked equations: all of ``J_t``, its diagonal, and what a batch dimension makes independent."""

from __future__ import annotations

import importlib
import warnings
import weakref
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = [
    "batch_size",
    "diagonals",
    "differentiable",
    "full",
    "linear_part",
    "nearest_carry",
    "windows",
]

_batched: weakref.WeakKeyDictionary[Loop, bool] = weakref.WeakKeyDictionary()

Windows = tuple[torch.Tensor, ...]
"""What each carry reads at every step, (T, *shape)."""


def windows(system: System, states: States) -> Windows:
    """Return what each carry reads at every step of a trajectory."""
    return tuple(carry.window(states, 0, system.steps) for carry in system.carries)


def differentiable(system: System) -> tuple[int, ...]:
    """Return the carries that read floating-point components; the others' Jacobian counts as zero."""
    return tuple(i for i, carry in enumerate(system.carries) if carry.before.is_floating_point())


@cache
def _forward_mode() -> None:
    """Import torch's forward-mode decompositions, which script themselves and so warn of torch's own deprecation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _jvp(function: Callable[..., States], point: Windows, tangents: Windows) -> tuple[States, States]:
    """Return ``function(*point)`` and its derivative along ``tangents``."""
    _forward_mode()
    pair: Any = torch.func.jvp(function, point, tangents)
    return pair[0], pair[1]


def _equations(system: System, start: int, stop: int, read: Windows) -> Callable[..., States]:
    """Return ``h`` at steps ``start .. stop-1`` as a function of what its differentiable carries read."""
    fixed = system.fixed(slice(start, stop))
    for carry, value in zip(system.carries, read, strict=True):
        fixed[carry.placeholder] = value[start:stop]
    free = [system.carries[i] for i in differentiable(system)]
    smooth = [i for i, c in enumerate(system.base()) if c.is_floating_point()]
    system.body.layout(fixed, stop - start)  # chosen before a transform looks at it

    def equations(*moved: torch.Tensor) -> States:
        arguments = list(fixed)
        for carry, value in zip(free, moved, strict=True):
            arguments[carry.placeholder] = value
        states = system.pick(system.body(arguments, stop - start))
        return tuple(states[i] for i in smooth)

    return equations


def batch_size(system: System) -> int:
    """Return ``B`` when all components are ``(B, ...)`` and no sample's equations read another's state, else 1.

    Found by differentiating at a random point: a tangent in one sample must leave all others exactly at zero. It only
    decides the shape of Jacobians; a solve's residual check does not rest on it. Measured once for a loop.
    """
    if system.loop not in _batched:
        _batched[system.loop] = _batch_size(system) > 1
    return system.carries[differentiable(system)[0]].before.shape[1] if _batched[system.loop] else 1


def _batch_size(system: System) -> int:
    free = [system.carries[i] for i in differentiable(system)]
    sizes = {carry.before.shape[1] if carry.before.dim() > 1 else 0 for carry in free}
    if len(sizes) != 1:
        return 1
    (size,) = sizes
    if size < 2:
        return 1
    generator = torch.Generator().manual_seed(0)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    read = tuple(carry.before for carry in system.carries)
    point = tuple(noise(c.before[:1]) for c in free)
    equations = _equations(system, 0, 1, read)
    for sample in range(size):
        tangents = tuple(torch.zeros_like(p) for p in point)
        for tangent, value in zip(tangents, point, strict=True):
            tangent[:, sample] = noise(value[:, sample])
        for moved in _jvp(equations, point, tangents)[1]:
            if moved.shape[1:2] != (size,):
                return 1
            others = (torch.arange(size) != sample).to(moved.device)
            if bool((moved[:, others] != 0).any()):
                return 1
    return size


def full(system: System, read: Windows, batch: int) -> torch.Tensor:
    """Return ``d h_t / d s_{t-d}`` for ``d = 1 .. reach`` at all steps, (T, batch, reach, N, N); zero where ``t < d``.

    ``N`` counts the floating-point elements of one sample's state, component after component. One forward-mode
    product a column, all steps and samples together.
    """
    free = differentiable(system)
    sizes = [s[0].numel() // batch if s.is_floating_point() else 0 for s in system.base()]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    total = sum(sizes)
    result = read[free[0]].new_zeros(system.steps, batch, system.reach, total, total)
    for start in range(0, system.steps, system.rows_limit):
        stop = min(system.steps, start + system.rows_limit)
        rows = stop - start
        equations = _equations(system, start, stop, read)
        part = tuple(read[i][start:stop] for i in free)
        for position, index in enumerate(free):
            carry = system.carries[index]
            size = sizes[carry.component]
            for column in range(size):
                tangents = tuple(torch.zeros_like(p, memory_format=torch.contiguous_format) for p in part)
                tangents[position].view(rows, batch, size)[:, :, column] = 1
                moved = _jvp(equations, part, tangents)[1]
                flat = torch.cat([m.reshape(rows, batch, -1) for m in moved], dim=2)
                result[start:stop, :, carry.distance - 1, :, offsets[carry.component] + column] += flat
    for distance in range(1, system.reach + 1):
        result[:distance, :, distance - 1] = 0
    return result


def nearest_carry(system: System, component: int) -> int:
    """Return the index of the carry that reads ``component`` from the least distance."""
    own = [i for i, carry in enumerate(system.carries) if carry.component == component]
    return min(own, key=lambda i: system.carries[i].distance)


def linear_part(system: System, read: Windows, index: int, tangent: torch.Tensor) -> torch.Tensor:
    """Return ``(d h_t / d window) tangent_t`` of carry ``index``, in its own component, (T, *shape)."""
    free = differentiable(system)
    smooth = [i for i, s in enumerate(system.base()) if s.is_floating_point()]
    own = smooth.index(system.carries[index].component)
    pieces: list[torch.Tensor] = []
    for start in range(0, system.steps, system.rows_limit):
        stop = min(system.steps, start + system.rows_limit)
        equations = _equations(system, start, stop, read)
        part = tuple(read[i][start:stop] for i in free)
        tangents = tuple(
            tangent[start:stop] if i == index else torch.zeros_like(p) for i, p in zip(free, part, strict=True)
        )
        pieces.append(_jvp(equations, part, tangents)[1][own])
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def diagonals(system: System, read: Windows, batch: int, probes: int) -> tuple[torch.Tensor | None, ...]:
    """Return for each component the diagonal of ``d h_t / d s_{t-d}`` (nearest carry), (T, *shape), zero for ``t < d``.

    ``probes=0``: exactly, one product for each element of a sample's state. Otherwise the mean of ``v * (J v)`` over
    that many random sign vectors, the same ones every time (M. Hutchinson's unbiased estimate, 1990). ``None`` for
    a component that is not floating-point.
    """
    generator = torch.Generator().manual_seed(0)
    result: list[torch.Tensor | None] = []
    for component, state in enumerate(system.base()):
        if not state.is_floating_point():
            result.append(None)
            continue
        index = nearest_carry(system, component)
        value = read[index]
        diagonal = torch.zeros_like(value, memory_format=torch.contiguous_format)
        if probes:
            for _ in range(probes):
                signs = torch.randint(0, 2, value.shape[1:], generator=generator) * 2 - 1
                tangent = signs.to(value).expand_as(value)
                diagonal += tangent * linear_part(system, read, index, tangent) / probes
        else:
            size = value[0].numel() // batch
            for column in range(size):
                tangent = torch.zeros_like(value, memory_format=torch.contiguous_format)
                tangent.view(-1, batch, size)[:, :, column] = 1
                diagonal += tangent * linear_part(system, read, index, tangent)
        diagonal[: system.carries[index].distance] = 0
        result.append(diagonal)
    return tuple(result)
