"""What the tail of a sampling loop reads at each sweep; what is the same at every sweep is made once a solve.

    selected_n (T, ...) = sources_n[p_t],   own_n (T, ...) = the step's own operands,   whole_n: the same at every step

What a step that is final selects is final too, so only the rows of the others are read again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.sampling_results import stacked_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

    from fxjacobi.sampling import JacobiWrites

__all__ = ["SamplingInputs"]


class SamplingInputs:
    """See the module's docstring.

    Args:
        block: The loop's programs, and where it selects what.
        operands: The loop's operands.
        base: The array before the loop, flat.

    Attributes:
        invariants: The operands that are the same at every step, in the order of the programs.
        shared: What the prelude computes of them.
        flags: Its flags (see :mod:`fxjacobi.array_programs`).
    """

    def __init__(self, block: JacobiWrites, operands: Sequence[Any], base: torch.Tensor) -> None:
        self.block = block
        self.operands = operands
        self.base = base
        self.structure = block.proof.structure
        bindings = self.structure.bindings
        self.invariants = [operands[bindings[node].operand] for node in block.parts.invariants]
        *self.shared, self.flags = block.prelude(*self.invariants)
        self._constant: dict[fx.Node, Any] = dict(zip(block.parts.shared, self.shared, strict=True))
        self._constant |= dict(zip(block.parts.invariants, self.invariants, strict=True))
        self._own = {
            one.node: stacked_steps(bindings[one.node], operands) for one in block.parts.inputs if one.kind == "step"
        }
        self._selected: dict[fx.Node, torch.Tensor] = {}

    def forget(self) -> None:
        """Read all rows anew, into other memory: what the last sweep read may lie in results."""
        self._selected = {}

    def at(
        self,
        array: torch.Tensor,
        sources: Sequence[Any],
        states: dict[fx.Node, torch.Tensor],
        start: int,
        fresh: int,
    ) -> list[Any]:
        """Return the tail's operands for the steps of the block from ``start`` on.

        Args:
            array: The array.
            sources: What the network computed of it.
            states: What each step handed on in the last sweep, ``(T, ...)``.
            start: The first step.
            fresh: The first step whose selections may have changed since the last sweep.
        """
        known: dict[fx.Node, Any] = dict(zip(self.block.parts.sources, sources, strict=True))
        known |= dict.fromkeys(self.structure.versions, array)
        arguments: list[Any] = []
        for one in self.block.parts.inputs:
            node = one.node
            if one.kind == "access":
                arguments.append(self._select(node, known, start, fresh))
            elif one.kind == "step":
                arguments.append(self._own[node][start : start + self.block.steps])
            elif one.kind == "state":
                arguments.append(states[node][start - 1] if start else self.operands[self._init(node)])
            else:
                arguments.append(known[node] if node in known else self._constant[node])
        return arguments

    def _init(self, node: fx.Node) -> int:
        return self.structure.states[node].init[0]

    def _select(self, node: fx.Node, known: dict[fx.Node, Any], start: int, fresh: int) -> torch.Tensor:
        source = self.structure.accesses[node].source
        places, total = self.block.selected[node], self.structure.trip_count
        if self.block.steps < total:  # a window slides: its rows are never the same, and each is to be aligned
            stop = start + self.block.steps
            value = known[source] if source in known else self._constant[source]
            return self._early(node, places.read(value, start, stop), start)
        held = self._selected.get(node)
        if held is None:
            value = known[source] if source in known else self._constant[source]
            held = self._selected[node] = self._early(node, places.read(value, 0, total), 0)
        elif source in known and fresh < total:
            rows = held[fresh:]
            self._early(node, places.read(known[source], fresh, total, out=rows), fresh)
        return held

    def _early(self, node: fx.Node, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Put what was there before the loop in place of elements that the step reads before they are written."""
        early = self.block.early.get(node)
        if early is not None:
            stop = start + len(rows)
            before = self.block.selected[node].read(self.base, start, stop)
            rows.copy_(torch.where(early[start:stop], before, rows))
        return rows
