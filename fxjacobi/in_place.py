"""Which writes of a loop's body may go into the array itself, because nobody reads the old version afterwards.

A graph is functional: ``x' = write(x, v, index)`` copies ``x``. In a loop that carries ``x`` that is one copy a step. The
copy may be saved where every read of ``x``, through views too, comes before the write, and no version of the array but the
last lives on: then one copy before the loop does.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch

from fxjacobi import ops
from fxjacobi.loops import Carried, Loop, Stacked, Step

if TYPE_CHECKING:
    from torch import fx

__all__ = ["in_place_writes"]


def in_place_writes(loop: Loop) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Return, for each carried placeholder whose array may be written in place, the body's writes to it, in order."""
    nodes = list(loop.body.graph.nodes)
    order = {node: at for at, node in enumerate(nodes)}
    placeholders = [node for node in nodes if node.op == "placeholder"]
    outputs = nodes[-1].args[0]
    roots = _aliases(nodes)
    found: dict[fx.Node, tuple[fx.Node, ...]] = {}
    for placeholder, binding in zip(placeholders, loop.bindings, strict=True):
        if not isinstance(binding, Carried) or binding.distance != 1:
            continue
        if sum(isinstance(b, Carried) and b.output == binding.output for b in loop.bindings) > 1:
            continue
        chain = _chain(outputs[binding.output], placeholder)
        if not chain or not _last_only(loop, binding.output):
            continue
        versions = {placeholder, *chain}
        # An output that is or sees a version would change with the next write; the carry itself is the exception.
        kept = [o for i, o in enumerate(outputs) if i != binding.output]
        if any(roots.get(o, frozenset()) & versions for o in kept):
            continue
        if all(_unread_after(write, roots, order, nodes) for write in chain):
            found[placeholder] = tuple(chain)
    return found


def _chain(last: fx.Node, first: fx.Node) -> list[fx.Node]:
    """The writes that lead from ``first`` to ``last``, in order; none if there is another operation between."""
    chain: list[fx.Node] = []
    node = last
    while node is not first:
        if node.op != "call_function" or node.target is not ops.write:
            return []
        chain.append(node)
        node = node.args[0]  # type: ignore[assignment]
    return chain[::-1]


def _last_only(loop: Loop, output: int) -> bool:
    """Whether of the output's values only the last step's is a result."""
    for result in loop.results:
        match result:
            case Stacked(other):
                if other == output:
                    return False
            case Step(other, step):
                if other == output and step != loop.trip_count - 1:
                    return False
    return True


def _aliases(nodes: list[fx.Node]) -> dict[fx.Node, frozenset[fx.Node]]:
    """For each node, the nodes whose memory its value may share, itself among them."""
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in nodes:
        shared = frozenset({node})
        if node.op == "call_module" or node.target is operator.getitem or _is_view(node):
            shared = shared.union(*(roots[n] for n in node.all_input_nodes))
        roots[node] = shared
    return roots


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return any(argument.alias_info is not None for argument in target._schema.arguments)


def _unread_after(
    write: fx.Node, roots: dict[fx.Node, frozenset[fx.Node]], order: dict[fx.Node, int], nodes: list[fx.Node]
) -> bool:
    base = write.args[0]
    return not any(
        base in roots[read] and user is not write and order[user] > order[write]
        for read in nodes
        for user in read.users
        if user.op != "output"
    )
