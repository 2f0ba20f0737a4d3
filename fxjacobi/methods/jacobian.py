"""Derivatives of the stacked equations: all of ``J_t``, its diagonal, and what a batch dimension makes independent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxjacobi.system import States, System

__all__ = ["batch_size", "diagonals", "full", "linear_part"]

Windows = tuple[torch.Tensor, ...]
"""What each carry reads at every step, (T, *shape)."""


def windows(system: System, states: States) -> Windows:
    """Return what each carry reads at every step of a trajectory."""
    return tuple(carry.window(states, 0, system.steps) for carry in system.carries)


def _function(system: System, start: int, stop: int) -> Callable[..., States]:
    fixed = system.fixed(slice(start, stop))

    def equations(*read: torch.Tensor) -> States:
        arguments = list(fixed)
        for carry, value in zip(system.carries, read, strict=True):
            arguments[carry.placeholder] = value
        return system.pick(system.body(arguments, stop - start))

    return equations


def _warm(system: System, start: int, stop: int, read: Windows) -> Callable[..., States]:
    """Return the equations of a range, with the way of batching chosen before any transform looks at them."""
    equations = _function(system, start, stop)
    equations(*read)
    return equations


def batch_size(system: System) -> int:
    """Return ``B`` when all components are ``(B, ...)`` and no sample's equations read another's state, else 1.

    Found by differentiating at a random point: a tangent in one sample must leave all others exactly at zero. It only
    decides the shape of Jacobians; a solve's residual check does not rest on it.
    """
    shapes = [carry.before.shape[1:] for carry in system.carries]
    sizes = {shape[0] if shape else 0 for shape in shapes}
    if len(sizes) != 1:
        return 1
    (size,) = sizes
    if size < 2:
        return 1
    generator = torch.Generator().manual_seed(0)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    point = tuple(noise(c.before[:1]) for c in system.carries)
    equations = _warm(system, 0, 1, point)
    for sample in range(size):
        tangents = tuple(torch.zeros_like(p) for p in point)
        for tangent, value in zip(tangents, point, strict=True):
            tangent[:, sample] = noise(value[:, sample])
        for moved in torch.func.jvp(equations, point, tangents)[1]:
            if moved.shape[1:2] != (size,):
                return 1
            others = torch.arange(size) != sample
            if bool((moved[:, others.to(moved.device)] != 0).any()):
                return 1
    return size


def full(system: System, read: Windows, batch: int, start: int, stop: int) -> torch.Tensor:
    """Return ``d h_t / d window`` of all carries at steps ``start .. stop-1``: (n, batch, N, carries, N).

    ``N`` counts the elements of one sample's state, component after component. A carry only reads its own component,
    so its columns elsewhere are zero. One forward-mode product a column, all steps and samples together.
    """
    part = tuple(value[start:stop] for value in read)
    equations = _warm(system, start, stop, part)
    rows = stop - start
    sizes = [s[0].numel() // batch for s in system.base()]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    total = sum(sizes)
    result = part[0].new_zeros(rows, batch, total, len(part), total)
    for index, carry in enumerate(system.carries):
        columns = sizes[carry.component]
        for column in range(columns):
            tangent = torch.zeros_like(part[index], memory_format=torch.contiguous_format)
            tangent.view(rows, batch, columns)[:, :, column] = 1
            tangents = tuple(tangent if i == index else torch.zeros_like(p) for i, p in enumerate(part))
            moved = torch.func.jvp(equations, part, tangents)[1]
            flat = torch.cat([m.reshape(rows, batch, -1) for m in moved], dim=2)
            result[:, :, :, index, offsets[carry.component] + column] = flat
    return result


def nearest_carries(system: System) -> tuple[int, ...]:
    """Return, for each component, the index of the carry that reads it from the least distance."""
    return tuple(
        min((i for i, c in enumerate(system.carries) if c.component == component),
            key=lambda i: system.carries[i].distance)
        for component in range(len(system.components))
    )  # fmt: skip


def linear_part(system: System, read: Windows, carry: int, tangent: torch.Tensor) -> torch.Tensor:
    """Return ``(d h_t / d window) tangent_t`` for one carry, in its own component, at all steps, (T, *shape)."""
    pieces: list[torch.Tensor] = []
    for start in range(0, system.steps, system.rows_limit):
        stop = min(system.steps, start + system.rows_limit)
        part = tuple(value[start:stop] for value in read)
        equations = _warm(system, start, stop, part)
        tangents = tuple(tangent[start:stop] if i == carry else torch.zeros_like(p) for i, p in enumerate(part))
        pieces.append(torch.func.jvp(equations, part, tangents)[1][system.carries[carry].component])
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def diagonals(system: System, read: Windows, batch: int, probes: int) -> States:
    """Return for each component the diagonal of ``d h_t / d s_{t-d}`` (nearest carry), (T, *shape).

    ``probes=0``: exactly, one product for each element of a sample's state. Otherwise the mean of ``v * (J v)`` over
    that many random sign vectors, the same ones every time (an unbiased estimate: M. Hutchinson, 1990; arXiv
    2407.19115, section 5, uses exact diagonals).
    """
    generator = torch.Generator().manual_seed(0)
    result: list[torch.Tensor] = []
    for index in nearest_carries(system):
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
        result.append(diagonal)
    return tuple(result)
