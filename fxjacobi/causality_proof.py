"""What an analysis of causality returns: a proof and what it rests on, or a refusal and what to blame.

See :mod:`fxjacobi.causality`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from fxjacobi.array_loop import ArrayLoop

__all__ = ["CausalityProof", "Refusal", "UnknownOp"]


@dataclass(frozen=True, slots=True)
class UnknownOp:
    """An operation without a rule: everything after it is taken to depend on everything.

    Args:
        node: Its name in the body.
        op: The operation.
        site: The user's file and line, if known.
    """

    node: str
    op: str
    site: str


@dataclass(frozen=True, eq=False)
class CausalityProof:
    """Every equation depends on earlier equations only.

    Args:
        structure: The loop, taken apart.
        position_ranks: ``int32`` of the array's shape: the equation that writes an element, or -1.
        ranks: For each node of the network, by name, the largest equation that each element depends on.
        step_ranks: For each equation, the largest equation that its value depends on.
        kills: Nodes at which an absorbing constant (``0 * x``) removed a dependence: their outputs must not be NaN.
        limits: What finite masks outweigh (:mod:`fxjacobi.causal_rules.finite_masks`), by node: the largest magnitude of
            a placeholder's elements (the array's: before the loop and at every sweep), the largest Euclidean norm of
            a normalisation's rows.
        reads: Names of the constants (masks, zero weights) that the proof rests on; it holds while they are unchanged.
        unknown_ops: Operations without a rule that the proof could do without.
    """

    structure: ArrayLoop
    position_ranks: torch.Tensor
    ranks: dict[str, torch.Tensor]
    step_ranks: tuple[int, ...]
    kills: tuple[str, ...]
    limits: dict[str, float]
    reads: frozenset[str]
    unknown_ops: tuple[UnknownOp, ...]

    @property
    def depth(self) -> int:
        """Length of the longest chain of equations: after this many sweeps, Jacobi is done whatever the values."""
        depths: list[int] = []
        longest: list[int] = []  # running maximum: depending on rank r may mean on all up to r
        for rank in self.step_ranks:
            depths.append(1 if rank < 0 else longest[rank] + 1)
            longest.append(max(depths[-1], longest[-1] if longest else 0))
        return longest[-1]

    def of(self, structure: ArrayLoop, names: Mapping[str, str]) -> CausalityProof:
        """Return the proof as that of a loop with other nodes, for instance the same one for fewer samples.

        Args:
            structure: That loop, taken apart.
            names: Its names of this loop's nodes; what nodes without one rest on is for the caller to check.
        """
        kills = tuple(names[name] for name in self.kills if name in names)
        limits = {names[name]: limit for name, limit in self.limits.items() if name in names}
        if self.structure.array.name in self.limits:
            limits[structure.array.name] = self.limits[self.structure.array.name]
        return replace(
            self, structure=structure, position_ranks=structure.ranks(), ranks={}, kills=kills, limits=limits
        )

    def __str__(self) -> str:
        rests = f", resting on {', '.join(sorted(self.reads))}" if self.reads else ""
        limited = f", while what its masks outweigh keeps to its limits ({len(self.limits)})" if self.limits else ""
        return f"each of the {len(self.step_ranks)} values written depends on values written before it only{rests}{limited}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a loop is not collapsed.

    Args:
        reason: A sentence.
        element: Index of the first element of the array whose value depends on what is not written yet, or ``None``.
        step: The step that writes it.
        rank: The latest equation that it may depend on.
        node: The node that brought in the dependence.
        op: Its operation.
        site: The user's file and line.
        unknown_ops: Operations without a rule, each taken to depend on everything.
    """

    reason: str
    element: tuple[int, ...] | None = None
    step: int | None = None
    rank: int | None = None
    node: str | None = None
    op: str | None = None
    site: str | None = None
    unknown_ops: tuple[UnknownOp, ...] = ()

    def __str__(self) -> str:
        return self.reason
