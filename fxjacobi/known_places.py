"""Constants of a graph that say which elements are written: what they are, and which of the model's tensors they rest on."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from fxjacobi import ops
from fxjacobi.emit import elements
from fxjacobi.equations import resting_on
from fxjacobi.graph import is_random, spec_of

__all__ = ["KnownPlaces"]

_LARGEST = 1 << 20
"""Elements of a constant that are looked at."""

_MOVES = frozenset({ops.write, ops.restride})


@dataclass
class KnownPlaces:
    """Evaluates what does not depend on data: creations, tensors made of Python values, and what follows from them.

    Tensors of the model (buffers, tensors of a module's globals; not parameters) count if asked for: the graph must then
    guard what :meth:`rests_on` names.
    """

    module: fx.GraphModule
    known: dict[fx.Node, Any] = field(default_factory=dict)
    held: dict[fx.Node, torch.Tensor] = field(default_factory=dict)

    def value(self, node: object) -> torch.Tensor | None:
        """Return the constant that ``node`` is, on the CPU, or ``None``."""
        if not isinstance(node, fx.Node):
            return None
        pending = [node]
        while pending:
            one = pending[-1]
            if one in self.known:
                pending.pop()
                continue
            missing = [used for used in one.all_input_nodes if used not in self.known]
            if missing and self._may_be(one):
                pending += missing
            else:
                self.known[one] = self._evaluated(one)
                pending.pop()
        found = self.known[node]
        return found.cpu() if isinstance(found, torch.Tensor) else None

    def rests_on(self, node: fx.Node) -> list[fx.Node]:
        """Return the model's tensors, ``get_attr`` nodes, that a known value rests on."""
        return [one for one in resting_on([node]) if one in self.held]

    def _may_be(self, node: fx.Node) -> bool:
        return (
            node.op == "call_function"
            and (isinstance(node.target, torch._ops.OpOverload) or node.target in _MOVES)
            and not is_random(node)
            and elements(spec_of(node)) <= _LARGEST
        )

    def _evaluated(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._held(node)
        if not self._may_be(node) or any(self.known[used] is None for used in node.all_input_nodes):
            return None
        if not node.all_input_nodes and torch.Tag.nondeterministic_bitwise in node.target.tags:  # type: ignore[union-attr]
            return None
        assert callable(node.target)
        return node.target(
            *map_arg(node.args, self.known.__getitem__), **map_arg(dict(node.kwargs), self.known.__getitem__)
        )

    def _held(self, node: fx.Node) -> torch.Tensor | None:
        tensor: object = attrgetter(str(node.target))(self.module)
        if not isinstance(tensor, torch.Tensor) or node.meta.get("literal"):
            return tensor if isinstance(tensor, torch.Tensor) else None
        if isinstance(tensor, nn.Parameter) or tensor.requires_grad or tensor.numel() > _LARGEST:
            return None
        if self._may_change(node):
            return None
        self.held[node] = tensor.detach().clone()
        return self.held[node]

    def _may_change(self, node: fx.Node) -> bool:
        """Whether a run may hand the tensor on as another: a count of steps, say, which is no constant."""
        spec = spec_of(node)
        outputs: list[fx.Node] = []
        map_arg(self.module.graph.output_node().args, outputs.append)
        return any(spec_of(one) == spec and node in resting_on([one]) for one in outputs)
