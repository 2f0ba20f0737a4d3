"""All T independent equations of a map evaluated in as few calls as keep their bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxjacobi.aliasing import storage_key
from fxjacobi.certificate import Certificate, Solution
from fxjacobi.constants import Constants, constant, held
from fxjacobi.errors import PassError
from fxjacobi.loops import Kind, Loop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["BatchedMap", "numbers", "rows_apart", "select_each", "select_own", "slice_each"]


class BatchedMap(nn.Module):
    """``outputs_t = h(x_t, c)`` for all ``t < T`` at once, ``(T, ...)``.

    Args:
        loop: The map, whose place this takes: the same operands, the same results.
        batched: The graph of all equations together; it takes the loop's operands and returns its results.
        reason: Which ways of batching were chosen, and what was measured.

    Attributes:
        last: What the last call did.

    Raises:
        PassError: ``loop`` carries something from step to step.
    """

    method = "batched"

    def __init__(self, loop: Loop, batched: fx.GraphModule, reason: str) -> None:
        super().__init__()
        if loop.kind is not Kind.MAP:
            raise PassError(f"the equations of a {loop.kind.value} depend on one another")
        self.loop = loop
        self.batched = batched
        self.reason = reason
        self._constants: Constants = {}
        self.last: Solution | None = None

    def forward(self, *operands: Any) -> tuple[Any, ...]:
        """Return the loop's results, and leave a :class:`Solution` in ``last``."""
        with held(self._constants):
            results: tuple[Any, ...] = tuple(self._own(result) for result in self.batched(*operands))
        self.last = Solution(1, Certificate.INDEPENDENT)
        return results

    def _own(self, result: Any) -> Any:
        """Return ``result``, or a copy where it lies in a constant, which is there for the next call too."""
        if not isinstance(result, torch.Tensor) or not self._constants:
            return result
        key = storage_key(result)
        return result.clone() if any(storage_key(c) == key for c in self._constants.values()) else result

    def extra_repr(self) -> str:
        """Show the trip count."""
        return f"{self.loop.trip_count} equations"


def rows_apart(op: Callable[..., Any], shape: Sequence[int], *args: Any) -> torch.Tensor:
    """Return the pointwise ``op`` of each step, ``(T, *shape)``, with every step a row of its own to the kernel.

    A vectorised CPU kernel rounds otherwise in its vector body than in its scalar tail, and the tail's place depends
    on where rows end. Rows of N elements at a stride of N + 1 are not merged into one long row, so each has the body
    and the tail that the single step has. Their number is made a multiple of the thread count, because threads split
    the elements evenly, not at rows.
    """
    threads = torch.get_num_threads()
    steps = max(a.shape[0] for a in args if isinstance(a, torch.Tensor) and a.dim() == len(shape) + 1)
    count = -(-steps // threads) * threads
    rows = [_spread(a, steps, count, shape) if isinstance(a, torch.Tensor) else a for a in args]
    result: torch.Tensor = op(*rows)
    return result[:steps].reshape(steps, *shape)


def _spread(value: torch.Tensor, steps: int, count: int, shape: Sequence[int]) -> torch.Tensor:
    if value.dim() == 0:
        return value
    flat = value.expand(steps, *shape).reshape(steps, -1)
    size = flat.shape[1]
    return nn.functional.pad(flat, (0, 1, 0, count - steps))[:, :size]


def numbers(values: Sequence[Any], shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Return one Python number a step as a tensor of ``shape``, which broadcasts against ``like`` and has its dtype."""
    return constant(tuple(values), dtype=like.dtype, device=like.device).reshape(shape)


def select_each(value: torch.Tensor, dim: int, indices: Sequence[int]) -> torch.Tensor:
    """Return ``value.select(dim, indices[t])`` for each ``t``, of one ``value`` for all steps."""
    size = value.shape[dim]
    if isinstance(indices, range) and indices.step > 0:
        return value.movedim(dim, 0)[indices.start : indices.stop : indices.step]
    places = constant([i % size for i in indices], device=value.device)
    return value.index_select(dim, places).movedim(dim, 0)


def select_own(values: torch.Tensor, dim: int, indices: Sequence[int]) -> torch.Tensor:
    """Return ``values[t].select(dim, indices[t])`` for each ``t``."""
    size = values.shape[dim + 1]
    places = constant([i % size for i in indices], device=values.device)
    return values.movedim(dim + 1, 1)[torch.arange(values.shape[0], device=values.device), places]


def slice_each(value: torch.Tensor, dim: int, starts: Sequence[int], length: int) -> torch.Tensor:
    """Return ``value.narrow(dim, starts[t], length)`` for each ``t``, of one ``value`` for all steps."""
    places = constant(tuple(starts), device=value.device)[:, None] + torch.arange(length, device=value.device)
    parts = value.movedim(dim, 0)[places]
    return parts.movedim(1, dim + 1)
