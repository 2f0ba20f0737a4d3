"""What fxjacobi keeps on every ``torch.fx`` node, and the well-formedness check run after every pass.

Vocabulary of a graph, everywhere in fxjacobi:

==================  ==========================================================================
``placeholder``     a tensor leaf of the call's arguments (or, in a body, a bound value)
``get_attr``        a parameter, buffer or other tensor, read live when the graph runs
``call_function``   an ATen overload, ``operator.getitem`` or a function of :mod:`fxjacobi.ops`
``call_module``     a submodule recorded once, or a :class:`fxjacobi.loops.Loop`
``output``          one flat tuple of nodes
==================  ==========================================================================

All of them are functional: no node writes to a value another node reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from fxjacobi.errors import PassError
from fxjacobi.ops import draw, draw_each

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "Site",
    "Spec",
    "TensorSpec",
    "check",
    "is_random",
    "make_module",
    "operation_of",
    "site_of",
    "spec_of",
    "spec_of_value",
    "stamp",
    "stamp_all",
]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, dtype, device and strides of a tensor, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    stride: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(map(str, self.shape))}]"


Spec: TypeAlias = "TensorSpec | tuple[Spec, ...] | None"
"""A node's value: a tensor, a tuple of values, or something that holds no tensor."""


@dataclass(frozen=True, slots=True)
class Site:
    """The place in the user's code that a node came from."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def spec_of_value(value: object) -> Spec:
    """Return the spec of a run-time value (tensors, tuples and lists of them, anything else: ``None``)."""
    if isinstance(value, torch.Tensor):
        return TensorSpec(tuple(value.shape), value.dtype, value.device, tuple(value.stride()))
    if isinstance(value, (tuple, list)):
        return tuple(spec_of_value(item) for item in value)
    return None


def operation_of(node: fx.Node) -> str:
    """Name ``node``'s operation in a sentence: ``aten.mm.default``, ``write``."""
    return str(node.target) if isinstance(node.target, (str, torch._ops.OpOverload)) else node.target.__name__


def spec_of(node: fx.Node) -> Spec:
    """Return the spec that a pass or the recorder stamped on ``node``."""
    spec: Spec = node.meta["spec"]
    return spec


def site_of(node: fx.Node) -> Site | None:
    """Return the user's file and line of ``node``, if it has one."""
    site: Site | None = node.meta.get("site")
    return site


def stamp(node: fx.Node, spec: Spec, site: Site | None = None) -> fx.Node:
    """Put ``spec`` and ``site`` on ``node`` and return it."""
    node.meta["spec"] = spec
    node.meta["site"] = site
    return node


class _Stamper(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            stamp(n, spec_of_value(value), site_of(n))
        return value


def stamp_all(module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Run ``module``, put the specs of what it computes on its nodes, and return what it returns."""
    return _Stamper(module, garbage_collect_values=True).run(*inputs)


def make_module(root: torch.nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A ``GraphModule`` whose Python code is written when it is first run or printed.

    Compiling the code of 20,000 nodes takes most of a second, and most stages of the compiler are never run.
    """
    return _LazyGraphModule(root, graph)


def is_random(node: fx.Node) -> bool:
    """Whether ``node`` draws from a random generator (so that its place in the order matters)."""
    if node.op != "call_function":
        return False
    return _may_draw(node.target) and not (isinstance(node.target, torch._ops.OpOverload) and _drops_nothing(node))


@cache
def _may_draw(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in target.tags
    return target is draw or target is draw_each


def _drops_nothing(node: fx.Node) -> bool:
    """Whether ``node`` draws for its dropout only, and has none (fused attention is tagged as random all the same)."""
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name in ("dropout_p", "dropout"):  # the latter is cuDNN's RNNs'
            given = (
                node.args[position] if position < len(node.args) and not argument.kwarg_only else argument.default_value
            )
            return bool(node.kwargs.get(argument.name, given) == 0)
    return False


def check(module: fx.GraphModule, *, after: str) -> None:
    """Raise :class:`PassError` unless ``module`` is well formed (every node stamped, output flat, names bound)."""
    module.graph.lint()
    outputs: Iterable[fx.Node] = (node for node in module.graph.nodes if node.op == "output")
    for node in module.graph.nodes:
        if node.op != "output" and "spec" not in node.meta:
            raise PassError(f"after {after}: node {node.name} carries no spec")
        if node.op == "call_method":
            raise PassError(f"after {after}: node {node.name} is a method call; fxjacobi graphs hold functions")
    for node in outputs:
        if not isinstance(node.args[0], tuple):
            raise PassError(f"after {after}: the output is not a flat tuple")
