"""What a function comes to beneath torch.func's transforms: the ATen calls that vmap and vjp make, as a graph.

``make_fx`` does this too. It imports the whole compiler for it, 2.6 s at the first use (measured, 2 cores, torch 2.13).
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from typing_extensions import override

from fxjacobi.graph import make_module, spec_of_value, stamp

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["lowered"]


def lowered(function: Callable[..., Any], *arguments: Any) -> fx.GraphModule:
    """Return ``function`` as a graph of the ATen calls that it makes for ``arguments``, stamped with specs.

    A placeholder for each argument, what ``function`` returns (a tensor, or tuples and lists of them) as the output. Holds
    for arguments of the same shapes and, where they are no tensors, the same values. A tensor that ``function`` brings
    along is an attribute.
    """
    # A tensor that is given twice is two placeholders, which need not be given the same one later.
    seen: set[int] = set()
    given: list[Any] = []
    for argument in arguments:
        again = isinstance(argument, torch.Tensor) and id(argument) in seen
        given.append(argument.view_as(argument) if again else argument)
        seen.add(id(argument))
    recording = _Recording()
    for argument in given:
        recording.placeholder(argument)
    with recording:
        outputs = function(*given)
    recording.graph.output(tree_map(recording.node_of, outputs))
    recording.graph.eliminate_dead_code()
    return make_module(recording.root, recording.graph)


class _Recording(TorchDispatchMode):
    """Appends a node for each ATen call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.graph = fx.Graph()
        self.root = torch.nn.Module()
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[torch.Tensor] = []  # an identity is good as long as its tensor lives

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that skips it imports it

    def placeholder(self, argument: Any) -> None:
        node = self.graph.placeholder(f"arg_{len(self.graph.nodes)}")
        if isinstance(argument, torch.Tensor):
            self._bind(argument, node)

    def node_of(self, value: Any) -> Any:
        """The node of a tensor; any other value as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self._nodes:
            name = f"constant_{len(self._alive)}"
            self.root.register_buffer(name, value, persistent=False)
            self._bind(value, self.graph.get_attr(name))
        return self._nodes[id(value)]

    def _bind(self, value: torch.Tensor, node: fx.Node) -> None:
        self._nodes[id(value)] = stamp(node, spec_of_value(value))
        self._alive.append(value)

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        nodes, keywords = tree_map(self.node_of, (tuple(args), dict(kwargs or {})))
        result = func(*args, **(kwargs or {}))
        node = stamp(self.graph.call_function(func, nodes, keywords), spec_of_value(result))
        if isinstance(result, torch.Tensor):
            self._bind(result, node)
        elif isinstance(result, (tuple, list)):
            for index, item in enumerate(result):
                if isinstance(item, torch.Tensor):
                    self._bind(item, self.graph.call_function(operator.getitem, (node, index)))
        return result
