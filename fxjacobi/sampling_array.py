"""The array that a sampling loop fills, as it grows in a solve: what is guessed, what is final, what was there before.

    X (B, ...), as the network reads it;   rows_k (T, elements): what the k-th write of each step wrote last

The rows say what a sweep changed without a gather from the array, and only changed rows are written to it.
"""

from __future__ import annotations

import cmath
import copy
from typing import TYPE_CHECKING

import numpy as np
import torch

from fxjacobi import ops
from fxjacobi.bits import same_bits
from fxjacobi.emit import dense_stride
from fxjacobi.placement import phase_of, placed_empty
from fxjacobi.sampling_results import first_step, put_back

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.array_loop import ArrayLoop
    from fxjacobi.array_places import Places

__all__ = ["SamplingArray"]

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_ROWS = 32
"""Rows that are compared first: the exact prefix grows by a few steps a sweep."""


class SamplingArray:
    """See the module's docstring.

    Args:
        structure: The loop, taken apart.
        written: For each write of a step, where it writes, ``(T, elements)``.
        operand: The array before the loop.

    Attributes:
        flat: The array's elements ``(N,)``, in the order of its dimensions.
        base: Those of the array before the loop.
        rows: For each write of a step, what the array holds there, ``(T, elements)``.
    """

    def __init__(self, structure: ArrayLoop, written: Sequence[Places], operand: torch.Tensor) -> None:
        self.spec = structure.array_spec
        self.equations = structure.equations
        self.written = tuple(written)
        operand = operand.to(self.spec.dtype)
        self.phase = phase_of(operand) if _written_in_place(structure) else 0
        self.base = operand.reshape(-1)
        self._allocate(self.base)
        self._refresh()

    def _allocate(self, values: torch.Tensor) -> None:
        """Lay out ``values`` where and as the ordinary run has the array: kernels round by that."""
        spec = self.spec
        layout = torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=values.device)
        self._laid = placed_empty(layout, self.phase)
        self._dense = spec.stride == dense_stride(spec.shape)
        self.flat = self._laid.view(-1).copy_(values) if self._dense else values.clone()

    def _refresh(self) -> None:
        self.rows = [one.read(self.flat, 0, len(one.positions)) for one in self.written]

    def load(self, flat: torch.Tensor) -> None:
        """Take over all elements from ``flat``."""
        if flat is not self.flat:
            self.flat.copy_(flat)
        self._refresh()

    def copied(self) -> SamplingArray:
        """Return the same array in memory of its own."""
        twin = copy.copy(self)
        twin._allocate(self.flat)
        twin.rows = [rows.clone() for rows in self.rows]
        return twin

    def value(self) -> torch.Tensor:
        """Return the array, laid out as in the ordinary run; it may change when this one does."""
        if self._dense:
            return self._laid
        shaped = self.flat.view(self.spec.shape)
        if self._laid.stride() == self.spec.stride:
            return self._laid.copy_(shaped)
        return ops.restride(shaped, self.spec.stride)  # an expanded one

    def before(self, equation: int) -> torch.Tensor:
        """Return the array as it was before ``equation``."""
        if equation >= self.equations:
            return self.value()
        twin = copy.copy(self)
        twin._allocate(self.flat)
        put_back(twin.flat, self.base, [one.positions for one in self.written], equation)
        return twin.value()

    def first_change(self, k: int, step: int, new: torch.Tensor) -> int | None:
        """Return the first row of ``new``, the ``k``-th writes from ``step`` on, that has other bits than are held."""
        start, size = 0, _ROWS
        while start < len(new):
            differs = self._difference(k, step + start, new[start : start + size])
            if differs.device.type == "cpu":  # numpy, because with few samples the calls are all that it takes
                rows = np.flatnonzero(differs.numpy().any(1))
                if len(rows):
                    return start + int(rows[0])
            else:
                found = (differs.amax(1) | differs.amin(1)).nonzero()
                if len(found):
                    return start + int(found[0])
            start, size = start + size, 4 * size
        return None

    def changed_elements(self, k: int, step: int, new: torch.Tensor) -> torch.Tensor:
        """Return the indices, within a step's write, of the elements that have other bits in ``new`` at any step."""
        differs = self._difference(k, step, new)
        found: torch.Tensor = (differs.amax(0) | differs.amin(0)).nonzero()[:, 0]
        return found

    def _difference(self, k: int, step: int, new: torch.Tensor) -> torch.Tensor:
        """Return integers ``(steps, elements)``, 0 where ``new`` has the bits of the ``k``-th writes from ``step`` on."""
        old = self.rows[k][step : step + len(new)]
        if not new.is_complex():
            integer = _INTEGER_OF_SIZE[new.element_size()]
            return new.contiguous().view(integer) ^ old.view(integer)
        integer = _INTEGER_OF_SIZE[new.element_size() // 2]
        parts = torch.view_as_real(new.resolve_conj()).contiguous().view(integer) ^ torch.view_as_real(old).view(
            integer
        )
        return parts[..., 0] | parts[..., 1]

    def put(self, k: int, step: int, new: torch.Tensor) -> bool:
        """Take ``new`` as the ``k``-th writes of the steps from ``step`` on; return whether all of it is finite."""
        self.rows[k][step : step + len(new)].copy_(new)
        self.written[k].write(self.flat, step, new)
        if not (new.is_floating_point() or new.is_complex()):
            return True
        # A sum is finite only if every element is; it may overflow all the same.
        return cmath.isfinite(new.sum().item()) or bool(torch.isfinite(new).all())

    def reset(self, equation: int, *, only_non_finite: bool) -> bool:
        """Put the base values in place of (non-finite) guesses from ``equation`` on; return whether any differed."""
        any_reset = False
        for k, one in enumerate(self.written):
            step = first_step(equation, k, len(self.written))
            guess = self.rows[k][step:]
            if not guess.numel():
                continue
            base = one.read(self.base, step, len(one.positions))
            if only_non_finite:
                base = torch.where(torch.isfinite(guess), guess, base)
            if not same_bits(guess, base):
                any_reset = True
                guess.copy_(base)
                one.write(self.flat, step, base)
        return any_reset


def _written_in_place(structure: ArrayLoop) -> bool:
    """Whether the ordinary run writes into the array that it is given, and not into a new one at each step."""
    nodes = [write.node for write in structure.writes]
    return all(node.target is ops.write or node.all_input_nodes[0].target is ops.write for node in nodes)
