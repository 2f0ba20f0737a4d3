"""A graph with the tensors and submodules it names, as a module whose code is generated when first needed."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import fx

from fxjacobi.graph import make_module

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

__all__ = ["append_node", "assemble", "copy_node"]


# Without the detour of ``Node.__setattr__``, which takes a node out of the graph's table of targets and puts it back.
_set_args: Any = fx.Node.args.fset  # type: ignore[attr-defined] # mypy sees the property's value
_set_kwargs: Any = fx.Node.kwargs.fset  # type: ignore[attr-defined]


def append_node(
    graph: fx.Graph, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str | None = None
) -> fx.Node:
    """Append one node to ``graph``, as ``graph.create_node`` does, in a third of the time.

    The arguments are set afterwards: ``create_node`` would search them for symbolic sizes, which takes as long again
    as everything else.
    """
    node = graph.create_node(op, target, name=name)
    if args:
        _set_args(node, args)
    if kwargs:
        _set_kwargs(node, kwargs)
    return node


def copy_node(graph: fx.Graph, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
    """Append ``node`` with other arguments to ``graph``, under its own name."""
    copy = append_node(graph, node.op, node.target, args, kwargs, node.name)
    copy.meta.update(node.meta)
    return copy


def assemble(graph: fx.Graph, source: nn.Module, new: Mapping[str, nn.Module] | None = None) -> fx.GraphModule:
    """Return the module of ``graph``: its attributes are ``source``'s own (not copies), or submodules in ``new``.

    Between passes nobody runs the graph, and generating code for 300,000 nodes takes longer than the passes do; so
    the code is generated when it is first read or run.
    """
    attributes: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in attributes:
            target = str(node.target)
            attributes[target] = new[target] if new is not None and target in new else attrgetter(target)(source)
    result = make_module(attributes, graph)
    result.meta.update(getattr(source, "meta", {}))
    return result
