"""One computation run in the ordinary way and compiled: both results, and the times of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxjacobi.timing import interleaved, once

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["BothWays", "both_ways"]


@dataclass(frozen=True)
class BothWays:
    """What :func:`both_ways` returns; the times are explained in :class:`fxjacobi.demo.job.Outcome`."""

    ordinary: torch.Tensor
    solved: torch.Tensor
    ordinary_s: float
    first_s: float
    solved_s: float


def both_ways(
    run: Callable[[], torch.Tensor], compiled: Callable[[], torch.Tensor], tick: Callable[[], None]
) -> BothWays:
    """Call both; ``tick`` is called three times."""
    _, first_s = once(compiled)
    tick()
    ordinary, solved = run(), compiled()
    tick()
    ordinary_s, solved_s = interleaved([run, compiled], rounds=3, warmup=0)
    tick()
    return BothWays(ordinary, solved, ordinary_s, first_s, solved_s)
