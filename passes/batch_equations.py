"""batch_equations: the T independent equations of a map are evaluated in as few calls as keep their bits.

Fires on every loop without carries, innermost first, whose operations measured together are faster batched::

    before                           after
    map_0 = self.map_0(xs, w)        the same call, of a BatchedMap: addmm on (T B, H), tanh on (T, B, H), ...

Must not fire where an operation's single step has bits that no batched way reproduces and nothing is gained by
batching the others; the loop stays, and its ``reason`` says what was measured. Nor within a loop at whose steps the map's
operands lie in different ways (:mod:`fxjacobi.passes.unsettled`): what is measured for one says nothing about the others.
With ``exact=False`` rounding may differ.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from fxjacobi.batched import BatchedMap
from fxjacobi.exactness import choose_ways
from fxjacobi.graph import Spec, spec_of
from fxjacobi.loops import Kind, Loop
from fxjacobi.passes.base import Pass, PassResult
from fxjacobi.passes.memory_effects import Phases
from fxjacobi.passes.replace_blocks import replace_blocks
from fxjacobi.passes.unsettled import unsettled

if TYPE_CHECKING:
    from torch import fx, nn

__all__ = ["BatchEquations"]

logger = logging.getLogger(__name__)


def _operand(node: fx.Node) -> Spec | torch.Tensor:
    """Return a parameter or buffer itself, anything else by its spec."""
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        module = node.graph.owning_module
        if module is not None:
            value = getattr(module.get_submodule(owner), name)
            if isinstance(value, torch.Tensor):
                return value
    return spec_of(node)


@dataclass(frozen=True)
class BatchEquations(Pass):
    """Maps run batched.

    Args:
        exact: Whether the bits must be those of the single steps.
    """

    name: ClassVar[str] = "batch_equations"
    exact: bool = True

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Batch every map that gains by it."""
        phases = Phases()
        moving = unsettled(module, phases) if self.exact else set()
        return replace_blocks(module, lambda loop, node: self._batched(loop, node, phases, moving))

    def _batched(self, loop: Loop, node: fx.Node, phases: Phases, moving: set[fx.Node]) -> nn.Module:
        if loop.kind is not Kind.MAP:
            return loop
        if any(n in moving for n in node.all_input_nodes):
            return loop.with_reason("what it reads lies otherwise in memory at some steps of the loop around it")
        operands = [_operand(n) for n in node.args]  # type: ignore[arg-type]
        batching = choose_ways(loop, operands, exact=self.exact, phases=[phases(n) for n in node.args])  # type: ignore[arg-type]
        logger.info("%s: %s", node.name, batching)
        if batching.module is not None:
            return BatchedMap(loop, batching.module, batching.reason)
        return loop.with_reason(batching.reason)
