"""Whether a recurrence is affine in its state: an abstract interpretation of degree over the body.

For every value of the body compute which carried placeholders it depends on, and how: not at all, affinely
(``sum_c A_c s_c + b`` with ``A``, ``b`` free of the state), or in some other way. An affine dependence is *aligned*
when element ``i`` of the value, in flat order, depends on element ``i`` of the carry only. Rules follow the ops;
an op without a rule is not affine in anything. Nothing is sampled.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.loops import Carried, Loop
from fxjacobi.ops import write
from fxjacobi.rule_table import overloads

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Affinity", "affinity"]

aten = torch.ops.aten

Dependence: TypeAlias = dict[int, bool] | None
"""Carry (index of its placeholder) -> aligned; ``None``: not affine."""


@dataclass(frozen=True, slots=True)
class Affinity:
    """How an affine recurrence depends on its state.

    Args:
        diagonal: Every carried output depends only on itself, from one distance, element by element.
    """

    diagonal: bool


# Affine in the first argument, free of the rest; flat order kept.
_KEEPING = frozenset(overloads(
    "neg.default", "clone.default", "alias.default", "detach.default", "view.default", "reshape.default", "positive.default",
    "_unsafe_view.default", "unsqueeze.default", "squeeze.default", "squeeze.dim", "squeeze.dims", "flatten.using_ints",
    "unflatten.int", "contiguous.default", "lift_fresh.default", "lift_fresh_copy.default", "view_copy.default",
    "_to_copy.default", "to.dtype", "unsqueeze_copy.default", "tanh_backward.default", "sigmoid_backward.default",
    "threshold_backward.default", "gelu_backward.default", "silu_backward.default", "elu_backward.default",
    "leaky_relu_backward.default", "softplus_backward.default", "hardtanh_backward.default",
))  # fmt: skip
# Affine in the first argument, free of the rest; elements move or add up.
_MOVING = frozenset(overloads(
    "transpose.int", "t.default", "permute.default", "expand.default", "select.int", "slice.Tensor", "split.Tensor",
    "split_with_sizes.default", "split.sizes", "chunk.default", "unsafe_chunk.default", "unsafe_split.Tensor",
    "unsafe_split_with_sizes.default", "unbind.int", "sum.default", "sum.dim_IntList", "mean.default", "mean.dim",
    "cumsum.default", "flip.default", "roll.default", "diagonal.default", "tril.default", "triu.default", "repeat.default",
    "constant_pad_nd.default", "index_select.default", "gather.default", "index.Tensor", "movedim.int", "movedim.intlist",
    "narrow.default", "repeat_interleave.self_int", "diag_embed.default", "swapaxes.default", "trace.default",
    "masked_fill.Scalar", "mT.default", "avg_pool1d.default", "avg_pool2d.default", "expand_as.default", "broadcast_to.default",
))  # fmt: skip
# Sums: affine in all tensor arguments together.
_SUMS = frozenset(overloads("add.Tensor", "sub.Tensor", "rsub.Tensor", "add.Scalar", "sub.Scalar", "rsub.Scalar"))
_JOINS = frozenset(
    overloads(
        "cat.default", "stack.default", "select_scatter.default", "slice_scatter.default", "diagonal_scatter.default"
    )
)
# Products: linear in each of the first two tensor arguments.
_SCALED = frozenset(overloads("mul.Tensor", "mul.Scalar"))
_PRODUCTS = frozenset(
    overloads(
        "mm.default", "bmm.default", "matmul.default", "mv.default", "dot.default", "outer.default", "inner.default"
    )
)
# Divisions: linear in the first, free of the second.
_QUOTIENTS = frozenset(overloads("div.Tensor", "div.Scalar", "true_divide.Tensor"))
# A term plus a product: argument 0 + argument 1 x argument 2.
_FUSED = frozenset(overloads("addmm.default", "addmv.default", "baddbmm.default", "addbmm.default", "addr.default"))
_POINTWISE_FUSED = frozenset(overloads("addcmul.default"))
# Values free of the values of their arguments.
_SHAPES = frozenset(overloads(
    "zeros_like.default", "ones_like.default", "full_like.default", "new_zeros.default", "new_ones.default",
    "new_full.default",
))  # fmt: skip


def _size(node: fx.Node) -> int | None:
    spec = node.meta.get("spec")
    return torch.Size(spec.shape).numel() if isinstance(spec, TensorSpec) else None


class _Interpreter:
    """The abstract interpretation of one body."""

    def __init__(self, sizes: dict[int, int]) -> None:
        self.sizes = sizes  # elements of each carry

    def run(self, body: fx.GraphModule, inputs: Iterable[Dependence]) -> list[Dependence]:
        values: dict[fx.Node, Dependence] = {}
        arguments = iter(inputs)
        for node in body.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "output":
                return [values[a] if isinstance(a, fx.Node) else {} for a in node.args[0]]
            elif node.op == "call_module":
                values[node] = self._module(body, node, values)
            else:
                values[node] = self._apply(node, values) if node.op == "call_function" else {}
        raise AssertionError("a graph ends in its output")

    def _module(self, body: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Dependence]) -> Dependence:
        given = [values[a] if isinstance(a, fx.Node) else {} for a in node.args]
        if all(g == {} for g in given):
            return {}
        module = body.get_submodule(str(node.target))
        if isinstance(module, Loop) or not isinstance(module, fx.GraphModule):
            return None
        # getitem passes the dependence of the whole tuple on.
        return self._merged(self.run(module, given), None)

    def _merged(self, parts: Iterable[Dependence], size: int | None) -> Dependence:
        """Return the dependence of a sum of ``parts``, of ``size`` elements (``None``: nothing stays aligned)."""
        result: dict[int, bool] = {}
        for part in parts:
            if part is None:
                return None
            for carry, aligned in part.items():
                result[carry] = result.get(carry, True) and aligned and size == self.sizes[carry]
        return result

    def _product(self, first: Dependence, second: Dependence) -> Dependence:
        if first is None or second is None or (first and second):
            return None
        return first or second

    def _apply(self, node: fx.Node, values: dict[fx.Node, Dependence]) -> Dependence:
        def of(item: Any) -> Dependence:
            return values[item] if isinstance(item, fx.Node) else {}

        inputs = [values[n] for n in node.all_input_nodes]
        if all(i == {} for i in inputs) or node.target in _SHAPES:
            return {}
        if any(i is None for i in inputs):
            return None
        target, args, size = node.target, node.args, _size(node)
        rest_free = all(values[n] == {} for n in node.all_input_nodes if n is not args[0])
        if target is operator.getitem:
            return of(args[0])
        if target in _KEEPING or target in _MOVING:
            spec = node.meta.get("spec")
            if isinstance(spec, TensorSpec) and not (spec.dtype.is_floating_point or spec.dtype.is_complex):
                return None
            return self._merged([of(args[0])], size if target in _KEEPING else None) if rest_free else None
        if target in _SUMS:
            return self._merged(inputs, size)
        if target in _JOINS or target is write:
            return self._merged(inputs, None)
        if target in _SCALED or target in _PRODUCTS:
            return self._merged([self._product(of(args[0]), of(args[1]))], size if target in _SCALED else None)
        if target in _QUOTIENTS:
            return self._merged([of(args[0])], size) if of(args[1]) == {} else None
        if target in _FUSED or target in _POINTWISE_FUSED:
            kept = size if target in _POINTWISE_FUSED else None
            return self._merged([of(args[0]), self._product(of(args[1]), of(args[2]))], kept)
        return self._rare(node, [of(a) for a in args], size)

    def _rare(self, node: fx.Node, given: list[Dependence], size: int | None) -> Dependence:
        target = node.target
        if target is aten.where.self:
            return self._merged(given[1:], size) if given[0] == {} else None
        if target in (aten.lerp.Tensor, aten.lerp.Scalar):
            ends = self._merged(given[:2], size)
            if given[2] == {}:
                return ends
            return self._merged([given[2]], size) if ends == {} else None
        if target is aten.addcdiv.default:
            return self._merged(given[:2], size) if given[2] == {} else None
        if target is aten.masked_fill.Tensor:
            return self._merged([given[0], given[2]], None) if given[1] == {} else None
        if target is aten.linear.default or target is aten.convolution.default:
            bias: Dependence = given[2] if len(given) > 2 else {}
            return self._merged([self._product(given[0], given[1]), bias], None)
        return None


def affinity(loop: Loop) -> Affinity | None:
    """Return how the carried outputs depend on the carried inputs if all do so affinely, else ``None``."""
    placeholders = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
    carried = {i: b for i, b in enumerate(loop.bindings) if isinstance(b, Carried)}
    sizes: dict[int, int] = {}
    for index in carried:
        spec = spec_of(placeholders[index])
        if not isinstance(spec, TensorSpec) or not (spec.dtype.is_floating_point or spec.dtype.is_complex):
            return None
        sizes[index] = torch.Size(spec.shape).numel()
    inputs: list[Dependence] = [{i: True} if i in carried else {} for i in range(len(placeholders))]
    outputs = _Interpreter(sizes).run(loop.body, inputs)
    diagonal = True
    for output in {b.output for b in carried.values()}:
        dependence = outputs[output]
        if dependence is None:
            return None
        own = [i for i, b in carried.items() if b.output == output]
        diagonal &= len(own) == 1 and set(dependence) <= set(own) and all(dependence.values())
    return Affinity(diagonal)
