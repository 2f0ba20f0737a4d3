"""Newton's method: the equations linearised at the iterate, solved by one parallel scan of matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from fxjacobi.footprint import row_bytes
from fxjacobi.methods.associative_scan import matrix_affine_scan
from fxjacobi.methods.jacobian import batch_size, full, windows
from fxjacobi.methods.linearised import advance, flattened, has_float_state, unflattened
from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.settle import replace_non_finite

if TYPE_CHECKING:
    from fxjacobi.footprint import StateSize
    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["Newton", "solve_linear"]


@dataclass(frozen=True)
class Newton(Method):
    """``s_t = h_t(s^k_{t-1}) + J_t (s_{t-1} - s^k_{t-1})``, all ``t`` by one associative scan (DEER, arXiv 2309.12252).

    ``J_t`` is ``(B, N, N)`` with ``N`` elements of state a sample: memory ``T B N^2`` and work ``T B N^3``, so it is
    for small states. Carries from further back are stacked into one state (companion form). Few sweeps where Jacobi
    needs many; diverges where the equations are chaotic.
    """

    keeps_bits: ClassVar[bool] = False

    @override
    def applies(self, loop: Loop) -> bool:
        return has_float_state(loop)

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        return Iterate(replace_non_finite(guess, system.base(), 0), memory=batch_size(system))

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        values = system.next_states(iterate.states)
        jacobian = full(system, windows(system, iterate.states), iterate.memory)
        proposal = solve_linear(iterate.states, values, jacobian)
        return advance(system, iterate, contract, values, proposal, second_order=True)

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.update <= 1.0

    @override
    def of_samples(self, system: System, iterate: Iterate, samples: torch.Tensor) -> Iterate | None:
        return replace(iterate, memory=samples.shape[0]) if iterate.memory > 1 else None

    @override
    def bytes_per_step(self, loop: Loop, size: StateSize) -> int:
        return size.bytes + size.jacobian_bytes + row_bytes(loop)


def solve_linear(states: States, values: States, jacobian: torch.Tensor) -> States:
    """Return the ``s`` with ``s_t = values_t + sum_d J_{t,d} (s_{t-d} - states_{t-d})``; ``jacobian`` as of ``full``."""
    steps, batch, reach, total, _ = jacobian.shape
    flat = flattened(states, batch)
    terms = flattened(values, batch)
    for distance in range(1, min(reach, steps - 1) + 1):
        moved = (jacobian[distance:, :, distance - 1] @ flat[:-distance].unsqueeze(-1)).squeeze(-1)
        terms[distance:] -= moved
    if reach == 1:
        return unflattened(matrix_affine_scan(jacobian[:, :, 0], terms), values)
    # Companion form: z_t = (s_t, s_{t-1}, ..., s_{t-reach+1}).
    companion = jacobian.new_zeros(steps, batch, reach * total, reach * total)
    companion[:, :, :total] = jacobian.transpose(2, 3).reshape(steps, batch, total, reach * total)
    companion[:, :, total:, : (reach - 1) * total] = torch.eye((reach - 1) * total).to(jacobian)
    padded = torch.cat([terms, terms.new_zeros(steps, batch, (reach - 1) * total)], dim=2)
    return unflattened(matrix_affine_scan(companion, padded)[:, :, :total], values)
