"""What a solved sampling loop returns: the array at single steps or at all, and what the steps computed beside it.

One sweep over the final array gives all that the steps compute, ``(T, ...)`` each, the *ends*. The array as it was at step
t is the final one with everything that is written later put back to what was there before the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import fx

from fxjacobi.constants import constant
from fxjacobi.loops import Scanned, Stacked, Step, Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxjacobi.array_loop import ArrayLoop

__all__ = ["SamplingResults", "first_step", "put_back", "stacked_steps"]

V = TypeVar("V")


@dataclass(frozen=True, slots=True, eq=False)
class SamplingResults:
    """See the module's docstring.

    Args:
        structure: The loop, taken apart.
        ends: The nodes whose values the tail returns, in its order.
    """

    structure: ArrayLoop
    ends: tuple[fx.Node, ...]

    def end(self, node: fx.Node, ends: Sequence[V]) -> V:
        """Return, of one value an end, that of ``node``."""
        return ends[self.ends.index(node)]

    def want_ends(self) -> bool:
        """Whether the ends at the final array are asked for: by a guard, or by a result that is not the array."""
        structure = self.structure
        nodes = [structure.outputs[result.output] for result in structure.loop.results]
        return bool(structure.guards or any(isinstance(n, fx.Node) and n not in structure.versions for n in nodes))

    def written(self, k: int, ends: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return what the ``k``-th write of each step writes, ``(steps, elements)`` in the array's ``dtype``."""
        write = self.structure.writes[k]
        value = self.end(write.value, ends)
        # A value of fewer dimensions than the part it fills is broadcast, after its own leading step.
        missing = write.positions.dim() - value.dim()
        value = value.reshape(value.shape[0], *[1] * missing, *value.shape[1:])
        return value.expand(len(value), *write.positions.shape[1:]).reshape(len(value), -1).to(dtype)

    def collect(
        self,
        ends: Sequence[torch.Tensor],
        array: Callable[[int], torch.Tensor],
        own: Callable[[torch.Tensor], torch.Tensor] = lambda value: value,
    ) -> tuple[Any, ...]:
        """Return the loop's results.

        Args:
            ends: The ends at the final array, all steps; none where :meth:`want_ends` is false.
            array: Returns the array as it was before the equation of that number.
            own: Takes an end out of memory that the next solve writes to.
        """
        structure, count = self.structure, len(self.structure.writes)
        results: list[Any] = []
        for result in structure.loop.results:
            node = structure.outputs[result.output]
            version = structure.versions.get(node) if isinstance(node, fx.Node) else None
            match result:
                case Step(_, step) if version is not None:
                    results.append(array(step * count + version))
                case Stacked(_) if version is not None:
                    before = range(version, structure.trip_count * count + version, count)
                    results.append(torch.stack([array(equation) for equation in before]))
                case Step(_, step) if isinstance(node, fx.Node):
                    results.append(own(self.end(node, ends)[step]))
                case Stacked(_) if isinstance(node, fx.Node):
                    results.append(own(self.end(node, ends)))
                case _:
                    results.append(node)
        return tuple(results)


def first_step(equation: int, k: int, count: int) -> int:
    """Return the first step whose ``k``-th of ``count`` writes is equation ``equation`` or a later one."""
    return max(0, -(-(equation - k) // count))


def put_back(flat: torch.Tensor, base: torch.Tensor, written: Sequence[torch.Tensor], equation: int) -> None:
    """Put ``base`` in place of all that equation ``equation`` and later ones write to the flattened array."""
    for k, positions in enumerate(written):
        here = positions[first_step(equation, k, len(written)) :]
        flat[here] = base[here]


def stacked_steps(binding: Scanned | Table, operands: Sequence[Any]) -> torch.Tensor:
    """Return an operand that each step has its own part of, ``(T, ...)``."""
    if isinstance(binding, Table):
        return torch.stack([operands[number] for number in binding.operands])
    operand = operands[binding.operand]
    size = operand.shape[binding.dim]
    moved: torch.Tensor = operand.movedim(binding.dim, 0)
    indices = [index % size for index in binding.indices]
    if indices == list(range(len(indices))):
        return moved[: len(indices)]
    return moved.index_select(0, constant(indices, device=moved.device))
