"""Adding nodes to a graph together with their specs, and small facts about specs that several passes need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxjacobi.assemble import assemble
from fxjacobi.graph import Site, Spec, TensorSpec, spec_of, spec_of_value, stamp
from fxjacobi.layouts import contiguous_strides as dense_stride
from fxjacobi.layouts import is_contiguous as is_dense
from fxjacobi.layouts import lie_alike

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "call",
    "dense_stride",
    "elements",
    "infer",
    "is_dense",
    "is_view",
    "memory_of",
    "rebuilt",
    "same_layout",
    "size_in_bytes",
    "tensors_of",
]

aten = torch.ops.aten


def tensors_of(spec: Spec) -> Iterator[TensorSpec]:
    """Yield the tensors in ``spec``."""
    if isinstance(spec, TensorSpec):
        yield spec
    elif spec is not None:
        for item in spec:
            yield from tensors_of(item)


def elements(spec: Spec) -> int:
    """Return how many elements the tensors of ``spec`` have together."""
    return sum(torch.Size(tensor.shape).numel() for tensor in tensors_of(spec))


def size_in_bytes(spec: Spec) -> int:
    """Return how many bytes the tensors of ``spec`` have together."""
    return sum(torch.Size(tensor.shape).numel() * tensor.dtype.itemsize for tensor in tensors_of(spec))


def same_layout(a: TensorSpec, b: TensorSpec) -> bool:
    """Whether two tensors are alike to a kernel: shape, dtype, device, and strides where a dimension has more than one."""
    return (a.dtype, a.device) == (b.dtype, b.device) and lie_alike(a, b)


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` is an ATen op that returns its argument's memory, seen otherwise."""
    return node.op == "call_function" and (
        node.target is aten._unsafe_view.default
        or (isinstance(node.target, torch._ops.OpOverload) and bool(node.target.is_view))
    )


def memory_of(node: fx.Node) -> fx.Node:
    """Return the node whose memory ``node``'s value lies in, or may lie in: ``node`` itself unless it is a view."""
    while is_view(node) or node.target in (aten.reshape.default, aten.contiguous.default):
        node = node.all_input_nodes[0]
    return node


def _example(spec: Spec) -> Any:
    if isinstance(spec, TensorSpec):
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")
    return None if spec is None else tuple(_example(item) for item in spec)


def _on(spec: Spec, device: torch.device) -> Spec:
    if isinstance(spec, TensorSpec):
        return TensorSpec(spec.shape, spec.dtype, device, spec.stride)
    return None if spec is None else tuple(_on(item, device) for item in spec)


def infer(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Spec:
    """Return the spec of ``target(*args, **kwargs)`` from a run on the meta device; its device is that of the tensors."""
    nodes: list[fx.Node] = []

    def example(node: fx.Node) -> Any:
        nodes.append(node)
        return _example(spec_of(node))

    value = target(*fx.map_arg(args, example), **fx.map_arg(kwargs or {}, example))
    device = next((t.device for node in nodes for t in tensors_of(spec_of(node))), torch.device("cpu"))
    return _on(spec_of_value(value), device)


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any, site: Site | None = None) -> fx.Node:
    """Append ``target(*args)`` to ``graph`` with its spec."""
    return stamp(graph.call_function(target, args), infer(target, args), site)


def rebuilt(module: fx.GraphModule, graph: fx.Graph, added: dict[str, nn.Module]) -> fx.GraphModule:
    """Return ``graph`` as a module that holds what it names: attributes of ``module`` (shared) and ``added`` ones."""
    return assemble(graph, module, added)
