"""Which values' memory the caller gets to see."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import fx

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["escaping"]


def escaping(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that are outputs of ``graph`` or that outputs are views of.

    Two of them may not be made one, nor one of them an argument of the graph: the ordinary run's results do not
    share memory, and the caller may write to them.
    """
    waiting: list[fx.Node] = []
    for node in graph.find_nodes(op="output"):
        waiting.extend(node.all_input_nodes)
    found: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(_viewed(node))
    return found


def _viewed(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments whose memory ``node`` may share."""
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is not None and isinstance(value, fx.Node):
                yield value
        if node.target in (torch.ops.aten.reshape.default, torch.ops.aten.contiguous.default):
            yield from node.all_input_nodes
    elif node.op == "call_module" or node.target is operator.getitem:
        yield from node.all_input_nodes
