"""Adding nodes to a graph together with their specs, and small facts about specs that several passes need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxjacobi.graph import Site, Spec, TensorSpec, make_module, spec_of, spec_of_value, stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "call",
    "dense_stride",
    "elements",
    "infer",
    "is_dense",
    "is_view",
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
    return ((a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)) and all(
        size <= 1 or s == t for size, s, t in zip(a.shape, a.stride, b.stride, strict=True)
    )


def dense_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of ``shape``."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_dense(spec: TensorSpec) -> bool:
    """Whether ``spec`` is laid out as a contiguous tensor, where a dimension has more than one element."""
    dense = dense_stride(spec.shape)
    return all(size <= 1 or a == b for size, a, b in zip(spec.shape, spec.stride, dense, strict=True))


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` is an ATen op that returns its argument's memory, seen otherwise."""
    return node.op == "call_function" and (
        node.target is aten._unsafe_view.default
        or (isinstance(node.target, torch._ops.OpOverload) and bool(node.target.is_view))
    )


def _example(spec: Spec) -> Any:
    if isinstance(spec, TensorSpec):
        return torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device="meta")
    return None if spec is None else tuple(_example(item) for item in spec)


def _on(spec: Spec, device: torch.device) -> Spec:
    if isinstance(spec, TensorSpec):
        return TensorSpec(spec.shape, spec.dtype, device, spec.stride)
    return None if spec is None else tuple(_on(item, device) for item in spec)


def infer(target: Callable[..., Any], args: tuple[Any, ...]) -> Spec:
    """Return the spec of ``target(*args)``, evaluated on the meta device; it is on the device of ``args``' tensors."""
    nodes: list[fx.Node] = []

    def example(node: fx.Node) -> Any:
        nodes.append(node)
        return _example(spec_of(node))

    value = target(*fx.map_arg(args, example))
    device = next((t.device for node in nodes for t in tensors_of(spec_of(node))), torch.device("cpu"))
    return _on(spec_of_value(value), device)


def call(graph: fx.Graph, target: Callable[..., Any], *args: Any, site: Site | None = None) -> fx.Node:
    """Append ``target(*args)`` to ``graph`` with its spec."""
    return stamp(graph.call_function(target, args), infer(target, args), site)


def rebuilt(module: fx.GraphModule, graph: fx.Graph, added: dict[str, nn.Module]) -> fx.GraphModule:
    """Return ``graph`` as a module that holds what it names: attributes of ``module`` (shared) and ``added`` ones."""
    root: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            target = str(node.target)
            root[target] = added[target] if target in added else _attribute(module, target)
    result = make_module(root, graph)
    result.meta.update(module.meta)
    return result


def _attribute(module: nn.Module, target: str) -> Any:
    owner, _, name = target.rpartition(".")
    return getattr(module.get_submodule(owner), name)
