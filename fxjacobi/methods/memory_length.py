"""How soon a recurrence forgets where it started: the measure that chunk sizes come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxjacobi.methods.chunks import prepared, run_chunks, with_heads
from fxjacobi.methods.comparison import compared

if TYPE_CHECKING:
    from fxjacobi.methods.method import Contract
    from fxjacobi.system import States, System

__all__ = ["LONGEST_MEMORY", "memory_length"]

LONGEST_MEMORY = 256
"""Steps in which a recurrence that forgets must forget: chunks that are longer leave little to run side by side."""


def memory_length(system: System, contract: Contract, limit: int = LONGEST_MEMORY) -> int | None:
    """Return in how many steps the recurrence forgets its start to within the tolerance, or ``None`` if not in ``limit``.

    Up to four stretches of the loop, spread evenly, are run from the values before the loop and from these plus a unit
    normal deviate; the length is that after which the two runs agree. A chunk of that length needs two sweeps.
    Costs ``2 limit`` batched steps.
    """
    limit = min(limit, system.steps)
    starts = tuple(sorted({round(i * (system.steps - limit) / 3) for i in range(4)}))
    chunks = prepared(system, system.base(), starts, limit)
    generator = torch.Generator().manual_seed(0)  # a private one: the caller's random state stays as it is
    heads = tuple(
        head + _drawn(head, generator) if head.is_floating_point() or head.is_complex() else head
        for head in chunks.heads
    )
    runs: list[States] = []
    for moved in (chunks, with_heads(chunks, heads)):
        # (stretches * limit, *shape) -> (limit, stretches, *shape): tolerances are those of single steps.
        shape = (len(starts), limit)
        runs.append(tuple(value.unflatten(0, shape).transpose(0, 1) for value in run_chunks(system, moved).states))
    far = (compared(runs[0], runs[1], contract).units > 1.0).nonzero()
    length = int(far[-1]) + 2 if far.numel() else 1
    return length if length <= limit else None


def _drawn(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    dtype = torch.complex64 if like.is_complex() else torch.float32
    return torch.randn(like.shape, generator=generator, dtype=dtype).to(like)
