"""Which methods are worth measuring for a loop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxjacobi.batched_body import BatchedBody
from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.linearity import affinity
from fxjacobi.loops import Carried, Loop
from fxjacobi.methods.affine import Affine
from fxjacobi.methods.anderson import Anderson
from fxjacobi.methods.chunked import Chunked
from fxjacobi.methods.damped import Damped
from fxjacobi.methods.jacobi import Jacobi
from fxjacobi.methods.memory_length import LONGEST_MEMORY, memory_length
from fxjacobi.methods.native import Native, refusal, splits
from fxjacobi.methods.newton import Newton
from fxjacobi.methods.picard import Picard
from fxjacobi.methods.quasi_newton import QuasiNewton
from fxjacobi.methods.sequential import Sequential
from fxjacobi.methods.windowed import Windowed

if TYPE_CHECKING:
    from fxjacobi.methods.method import Contract, Method
    from fxjacobi.system import System

__all__ = ["candidates", "sized"]

# A dense Jacobian of more elements a sample costs more than any number of sweeps saves.
_DENSE = 64
_CHUNKS = (16, 32, 64, 128)

# Looking for a memory of so many steps takes twice as many batched ones: a tenth of a second.
_MOST_MEMORY = 2048


def candidates(
    loop: Loop, exact: bool, *, system: System | None = None, contract: Contract | None = None
) -> list[Method]:
    """Return the methods worth timing on ``loop``, the likeliest first and ``Sequential`` always among them.

    Args:
        loop: A recurrence.
        exact: Bits (only methods that keep them), or within a tolerance.
        system: The loop with operands; with ``contract``, chunk and window sizes come from the measured contraction.
        contract: The tolerance that the contraction is measured against.
    """
    body = BatchedBody.of(loop)
    if loop.trip_count < 2 or not body.uniform or not body.pure:
        return [Sequential()]
    chunks = [c for c in _CHUNKS if 2 * c <= loop.trip_count]
    found: list[Method] = [Chunked(c) for c in chunks]
    windows = [w for w in (64, 256) if w < loop.trip_count]
    if exact:
        return [Jacobi(), *map(Windowed, windows), *map(Chunked, chunks[:2]), Sequential()]
    if system is not None and contract is not None:
        with torch.no_grad():
            length = _memory(system, contract)
        found = [] if length is None else _warmed(length, loop.trip_count)
        if not found:
            found = [sized(Chunked, loop, length)]
        windows = [] if length is None else [w for w in (2 * length,) if w < loop.trip_count]
    linear = affinity(loop)
    small = _state_elements(loop) <= _DENSE
    if linear is not None and (linear.diagonal or small):
        # A scan passes over the trajectory 2 log T times; chunks that forget in a warm-up do so once or twice.
        short = any(isinstance(m, Chunked) and m.warm_up for m in found)
        found.insert(len(found) if short else 0, Affine())
    # First, for it takes as long as it takes: nothing converges, sooner or later.
    if system is None or refusal(system) is None:
        cores = torch.get_num_threads() if system is not None and splits(system) else 1
        found[:0] = [Native(lanes=cores), *([Native()] if cores > 1 else [])]
    found += [Jacobi(), *map(Windowed, windows), Picard(), Anderson(), QuasiNewton(0 if small else 2)]
    if small:
        found += [Newton(), Damped()]
    return [*(m for m in found if m.applies(loop)), Sequential()]


def _memory(system: System, contract: Contract) -> int | None:
    """Return the memory's length, looked for among longer stretches where the loop has room for them."""
    limit, most = LONGEST_MEMORY, max(LONGEST_MEMORY, min(_MOST_MEMORY, system.steps // 2))
    while limit <= most:
        length = memory_length(system, contract, limit)
        if length is not None:
            return length
        limit *= 2
    return None


def _warmed(length: int, steps: int) -> list[Method]:
    """Return chunks with a warm-up for a recurrence that forgets in ``length`` steps, the likeliest first.

    One sweep is enough where the warm-up is as long as the memory. Longer chunks run fewer steps twice, shorter ones make
    fewer calls: the longer the memory, the more of all calls are the warm-up's, whatever the chunks.
    """
    # An eighth more, because the memory was measured on a few stretches and every chunk must have forgotten.
    warm = length + length // 8 + 1
    more = 3 * warm // 2  # one chunk that forgets later than all stretches did costs a second sweep
    if steps >= 16 * warm:
        sizes = [(warm, warm), (4 * warm // 3, warm), (2 * warm, more), (2 * warm, warm), (4 * warm, warm)]
    else:
        sizes = [(warm // 2, warm), (warm, warm), (warm // 2, more), (warm // 4, warm), (2 * warm, warm)]
    return [Chunked(chunk, w) for chunk, w in sizes if chunk and w + 2 * chunk <= steps]


def sized(kind: type[Method], loop: Loop, length: int | None) -> Method:
    """Return a method of ``kind`` whose size fits a recurrence that forgets in ``length`` steps (``None``: not soon).

    Windows twice as long; chunks half as long where two of that length do not fit, so that some still run side by side.
    """
    steps = loop.trip_count
    if kind is Windowed:
        return Windowed(max(1, min(steps, 2 * (length or LONGEST_MEMORY))))
    if kind is Chunked:
        chunk = length or LONGEST_MEMORY
        while chunk > 1 and 2 * chunk > steps:
            chunk = -(-chunk // 2)
        return Chunked(chunk)
    return kind()


def _state_elements(loop: Loop) -> int:
    """Return the elements of one sample's state, taking dimension 0 for the batch where there are more."""
    total = 0
    placeholders = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
    for placeholder, binding in zip(placeholders, loop.bindings, strict=True):
        spec = spec_of(placeholder)
        if isinstance(binding, Carried) and isinstance(spec, TensorSpec):
            total += torch.Size(spec.shape[1:] if len(spec.shape) > 1 else spec.shape).numel()
    return total
