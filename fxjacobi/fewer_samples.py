"""Leaving samples that are final out of a sampling solve: how many at a time, which, and the smaller block.

Samples that do not depend on one another settle after different numbers of sweeps. One that a whole sweep did not
change is final. Once at most ``b = B / 2`` are not, they are solved alone, by the same loop for ``b`` samples
(:mod:`fxjacobi.smaller_batch`), and so on with halves of these. A sweep of all samples that changes nothing ends the
solve: so the answer does not rest on the smaller programs' bits, only the gain does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from fxjacobi.array_loop import array_loop
from fxjacobi.emit import dense_stride
from fxjacobi.sample_axis import NotPerSample, SampleAxis, take
from fxjacobi.sample_gain import SampleGain
from fxjacobi.sampling_solve import SamplingSolve
from fxjacobi.smaller_batch import SmallerBatch, smaller_batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxjacobi.causality import CausalityProof
    from fxjacobi.sampling import JacobiWrites
    from fxjacobi.sampling_array import SamplingArray

__all__ = ["FewerSamples", "Samples", "fewer_samples"]

_FEWEST = 8
"""Batches smaller than this are not worth another program."""

_JUDGED = 4
"""Calls after which the time that was gained decides."""

_MULTIPLE = 4
"""Matrix products of fewer rows than this round otherwise (measured on the CPU)."""


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of an array.

    Args:
        count: How many there are.
        dim: The array's dimension that holds them.
        numbers: For each write of a step, the sample that each element written belongs to.
    """

    count: int
    dim: int
    numbers: tuple[torch.Tensor, ...]

    def among(self, k: int, elements: torch.Tensor) -> torch.Tensor:
        """Return the samples of some elements, by their index, that the ``k``-th write of a step writes."""
        found: torch.Tensor = elements if self.in_order[k] else self.numbers[k][elements].unique()
        return found

    def union(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the samples that occur in any of ``parts``, in order, each once."""
        found: torch.Tensor = parts[0] if len(parts) == 1 else torch.cat([self.numbers[0][:0], *parts]).unique()
        return found

    @cached_property
    def in_order(self) -> tuple[bool, ...]:
        """For each write of a step, whether its n-th element is sample n's."""
        return tuple(bool((own == torch.arange(len(own), device=own.device)).all()) for own in self.numbers)


class FewerSamples:
    """A block for fewer samples, made when it is first needed.

    Args:
        smaller: The loop for fewer samples.
        build: Makes a block of a proof.
        proof: The proof for all samples, which holds for each of them.
        device: Where the array is.
        build_s: Seconds that a block took to be made for all samples.

    Attributes:
        size: How many samples it takes.
        checked: Whether a sweep of it was seen to have the bits of a whole sweep, and to be faster.
        gain: What it may gain.
    """

    def __init__(
        self,
        smaller: SmallerBatch,
        build: Callable[[CausalityProof], JacobiWrites],
        proof: CausalityProof,
        device: torch.device,
        build_s: float,
    ) -> None:
        self.smaller = smaller
        self.size = smaller.fewer
        self.checked = False
        self._build = build
        self._proof = proof
        self._device = device
        self._block: JacobiWrites | None = None
        self.gain = SampleGain(smaller.samples, smaller.fewer, build_s)
        self._calls, self._gain_s = 0, 0.0

    @property
    def block(self) -> JacobiWrites:
        """The block for fewer samples."""
        if self._block is None:
            structure = array_loop(self.smaller.loop)
            self._block = self._build(self._proof.of(structure, self.smaller.names))
        return self._block

    def spent(self, seconds: float, sweeps: int) -> None:
        """Record what ``sweeps`` sweeps of fewer samples took in one call; whole ones are saved, and one is added."""
        self._calls += 1
        if self._calls > 1:  # the first call may have made programs
            self._gain_s += (sweeps - 1) * self.gain.whole_s - seconds

    @property
    def wasteful(self) -> bool:
        """Whether sweeps of fewer samples have cost more than they saved, over the first calls."""
        return self._calls == _JUDGED and self._gain_s < 0

    def kept(self, unsettled: torch.Tensor) -> torch.Tensor:
        """Return the numbers of the samples to solve for: the unsettled ones, filled up with settled ones, in order."""
        settled = torch.ones(self.smaller.samples, dtype=torch.bool, device=self._device)
        settled[unsettled] = False
        others = settled.nonzero()[: self.size - len(unsettled), 0]
        return torch.cat([unsettled, others]).sort().values

    def start(self, whole: SamplingSolve, kept: torch.Tensor) -> SamplingSolve:
        """Return the solve for the samples ``kept``, at the point that ``whole`` has reached."""
        part = SamplingSolve(self.block, self.smaller.operands(whole.operands, kept))
        part.array.load(self.get(whole.array.flat, kept))
        part.final = whole.final
        names = {node.name: node for node in part.structure.states}
        for node, handed in whole.states.items():
            name, axis = self.smaller.states[node.name]
            some = handed if axis is None else take(handed, axis.moved(1), kept, self.smaller.samples)
            part.states[names[name]] = some.clone()
        return part

    def get(self, flat: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Return the part of the flattened array that belongs to the samples ``kept``."""
        return take(flat.view(self._proof.structure.array_spec.shape), self._axis, kept, self.smaller.samples).reshape(
            -1
        )

    def put(self, whole: SamplingArray, kept: torch.Tensor, part: SamplingArray) -> None:
        """Write ``part`` back into the array."""
        shape = self._proof.structure.array_spec.shape
        values = part.flat.view(part.spec.shape)
        whole.flat.view(shape).index_copy_(self._axis.dim, kept, values)
        whole.load(whole.flat)

    @property
    def _axis(self) -> SampleAxis:
        return self.smaller.axis


def fewer_samples(
    proof: CausalityProof,
    written: Sequence[torch.Tensor],
    build: Callable[[CausalityProof], JacobiWrites],
    build_s: float,
) -> tuple[Samples | None, FewerSamples | None, str]:
    """Return the samples of a proven loop's array, a block for about half of them, and why there is none.

    Args:
        proof: The proof.
        written: For each write of a step, ``(T, elements)`` positions in the flattened array.
        build: Makes a block of a proof for fewer samples.
        build_s: Seconds that this took for all of them.
    """
    spec = proof.structure.array_spec
    found: Samples | None = None
    reason = ""
    for dim, count in enumerate(spec.shape):
        numbers = _numbers(written, spec.shape, dim)
        if numbers is None:
            continue
        samples = Samples(count, dim, numbers)
        found = found or samples
        if count < _FEWEST:
            continue
        size = -(-count // (2 * _MULTIPLE)) * _MULTIPLE
        try:
            smaller = smaller_batch(proof.structure, dim, size)
        except NotPerSample as mixed:
            reason = reason or f"each sweep runs all {count} samples: {mixed}"
        else:
            return samples, FewerSamples(smaller, build, proof, spec.device, build_s), ""
    return found, None, reason


def _numbers(written: Sequence[torch.Tensor], shape: Sequence[int], dim: int) -> tuple[torch.Tensor, ...] | None:
    """Return the index along ``dim`` of each element that a step writes, if all steps write the same, and all of them."""
    stride = dense_stride(shape)[dim]
    found = []
    for positions in written:
        index = positions // stride % shape[dim]
        if not bool((index == index[:1]).all()) or len(index[0].unique()) != shape[dim]:
            return None
        found.append(index[0])
    return tuple(found)
