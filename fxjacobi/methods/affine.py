"""Affine recurrences, solved by one associative scan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from fxjacobi.batched_body import BatchedBody
from fxjacobi.footprint import row_bytes
from fxjacobi.graph import TensorSpec
from fxjacobi.linearity import affinity
from fxjacobi.loops import Carried
from fxjacobi.methods.associative_scan import affine_scan
from fxjacobi.methods.jacobian import batch_size, full, linear_part, windows
from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.newton import solve_linear

if TYPE_CHECKING:
    from fxjacobi.footprint import StateSize
    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["Affine"]


@dataclass(frozen=True)
class Affine(Method):
    """``s_t = A_t s_{t-d} + b_t`` in one sweep: ``b_t = h_t(0)``, ``A_t`` the derivative, then a scan.

    Elementwise where each element depends on itself only (minGRU, linear attention, exponential averages, diagonal
    SSMs), with ``A_t 1`` one forward-mode product; a scan of matrices otherwise. Applies where the body is affine in its
    state by structure (:func:`fxjacobi.linearity.affinity`), and the state is real.
    """

    keeps_bits: ClassVar[bool] = False

    @override
    def applies(self, loop: Loop) -> bool:
        # An affine map of complex numbers may conjugate them: then one derivative along 1 does not tell the factor.
        outputs = BatchedBody.of(loop).output_specs
        specs = [outputs[b.output] for b in loop.bindings if isinstance(b, Carried)]
        return affinity(loop) is not None and not any(isinstance(s, TensorSpec) and s.dtype.is_complex for s in specs)

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        nothing = tuple(torch.zeros_like(s, memory_format=torch.contiguous_format) for s in system.base())
        return Iterate(nothing)

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        # Steps t < d read the values before the loop, so their b_t is s_t itself.
        terms = system.next_states(iterate.states)
        read = windows(system, iterate.states)
        found = affinity(system.loop)
        if found is None or not found.diagonal:
            jacobian = full(system, read, batch_size(system))
            return replace(iterate, states=solve_linear(iterate.states, terms, jacobian), update=0.0)
        states: list[torch.Tensor] = []
        for component, term in enumerate(terms):
            index, carry = next((i, c) for i, c in enumerate(system.carries) if c.component == component)
            factor = linear_part(system, read, index, torch.ones_like(read[index]))
            states.append(affine_scan(factor, term, carry.distance))
        return replace(iterate, states=tuple(states), update=0.0)

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.update == 0.0

    @override
    def bytes_per_step(self, loop: Loop, size: StateSize) -> int:
        found = affinity(loop)
        diagonal = found is not None and found.diagonal
        return (6 * size.bytes if diagonal else size.jacobian_bytes) + row_bytes(loop)
