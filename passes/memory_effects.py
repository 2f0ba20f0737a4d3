"""On which properties of its memory a value's later use may depend, beyond its elements.

The last bits of a result may depend on where its arguments lie. Measured on the CPU: a small matrix product rounds by
the address that its rows start at (:mod:`fxjacobi.placement`), a vectorised function such as ``sigmoid`` by whether an
element falls into a full vector, that is by shape and strides; sums and products of real elements do not. Products,
quotients and absolute values of complex elements do, and so do sums with ``alpha``, which is fused in a vector only.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import fx

from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.ops import GUARDS, restride, write
from fxjacobi.placement import alignment

__all__ = ["WRITES", "Alignment", "Need", "Needs", "Phases", "keeps_layout"]

_aten = torch.ops.aten

_BY_ELEMENT = frozenset(
    {
        _aten.add.Tensor, _aten.add.Scalar, _aten.sub.Tensor, _aten.sub.Scalar, _aten.rsub.Scalar, _aten.mul.Tensor,
        _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar, _aten.neg.default, _aten.abs.default, _aten.relu.default,
        _aten.maximum.default, _aten.minimum.default, _aten.clamp.default, _aten.where.self, _aten.sign.default,
        _aten.eq.Tensor, _aten.eq.Scalar, _aten.ne.Scalar, _aten.lt.Scalar, _aten.le.Scalar, _aten.gt.Scalar,
        _aten.ge.Scalar, _aten.lt.Tensor, _aten.le.Tensor, _aten.gt.Tensor, _aten.ge.Tensor, _aten.floor.default,
        _aten.cat.default, _aten.stack.default, _aten.index_select.default, _aten.embedding.default,
    }
)  # fmt: skip
_WITH_ALPHA = frozenset(
    {_aten.add.Tensor, _aten.add.Scalar, _aten.sub.Tensor, _aten.sub.Scalar, _aten.rsub.Scalar}
)  # fmt: skip
_OF_COMPLEX = frozenset(
    {_aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar, _aten.abs.default}
)  # fmt: skip
WRITES = frozenset({write, _aten.select_scatter.default, _aten.slice_scatter.default})
_BY_LAYOUT = frozenset(
    {
        _aten.sum.default, _aten.sum.dim_IntList, _aten.mean.default, _aten.mean.dim, _aten.amax.default,
        _aten.amin.default, _aten.argmax.default, _aten.argmin.default, _aten.max.dim, _aten.min.dim, _aten.all.default,
        _aten.any.default, _aten._softmax.default, _aten._log_softmax.default, _aten.logsumexp.default,
        _aten.native_layer_norm.default, _aten.cumsum.default, _aten.sort.default, _aten.topk.default,
        _aten.clone.default, _aten._to_copy.default,
    }
)  # fmt: skip
_VIEWS = frozenset(
    {
        _aten.select.int, _aten.slice.Tensor, _aten.view.default, _aten.unsqueeze.default, _aten.squeeze.dim,
        _aten.squeeze.dims, _aten.squeeze.default, _aten.permute.default, _aten.transpose.int, _aten.t.default,
        _aten.expand.default, _aten.detach.default, _aten.alias.default, _aten.unbind.int, _aten.split.Tensor,
        _aten.split_with_sizes.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.diagonal.default,
        _aten.as_strided.default, _aten.unfold.default, _aten.lift_fresh.default,
    }
)  # fmt: skip


def keeps_layout(node: fx.Node) -> bool:
    """Whether the strides of ``node``'s value follow from its arguments': a view, a write, or element by element."""
    return (
        node.target in _VIEWS
        or node.target in WRITES
        or node.target in _BY_ELEMENT
        or (isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags)
    )


def _rounds_by_vector(node: fx.Node) -> bool:
    """Whether an operation on elements rounds otherwise in a full vector than in its tail, after all."""
    if node.target in _WITH_ALPHA:
        return bool(node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1) != 1)
    spec = node.meta.get("spec")
    parts = (spec, *(each.meta.get("spec") for each in node.all_input_nodes))
    return node.target in _OF_COMPLEX and any(isinstance(p, TensorSpec) and p.dtype.is_complex for p in parts)


_PARTS = frozenset({_aten.select.int, _aten.slice.Tensor})
_FROM_THE_START = (_VIEWS | WRITES) - _PARTS - {
    _aten.diagonal.default, _aten.as_strided.default, _aten.unfold.default,
    _aten.reshape.default, _aten.unbind.int, _aten.split.Tensor, _aten.split_with_sizes.default,
}  # fmt: skip
"""Operations whose value starts where their first argument does, or as far from an aligned address."""


class Need(IntEnum):
    """What a use may depend on: each includes those before it."""

    ELEMENTS = 0
    ORDER = 1
    """In which order its dimensions lie: a sum of two tensors lies as the first does, without its gaps."""
    LAYOUT = 2
    ALIGNMENT = 3


class Needs:
    """What the uses of a graph's nodes may depend on, views of them included."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, Need] = {}

    def of(self, node: fx.Node) -> Need:
        """The most that any use of ``node`` may depend on."""
        if node not in self._known:
            for each in reversed(node.graph.nodes):
                self._known[each] = max((self._by(user, each) for user in each.users), default=Need.ELEMENTS)
        return self._known[node]

    def _by(self, user: fx.Node, node: fx.Node) -> Need:
        target = user.target
        if user.op == "output" or target is restride or target in GUARDS:
            return Need.ELEMENTS
        if target is write:  # the copy lies as the array does
            return self._known[user] if user.args[0] is node else Need.ELEMENTS
        if target in _BY_ELEMENT:
            return Need.LAYOUT if _rounds_by_vector(user) else min(self._known[user], Need.ORDER)
        if target in _VIEWS:
            return max(self._known[user], Need.LAYOUT if target is _aten.as_strided.default else Need.ELEMENTS)
        if target in _BY_LAYOUT:
            return Need.LAYOUT
        pointwise = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
        return Need.LAYOUT if pointwise else Need.ALIGNMENT


class Alignment:
    """Which values of a graph surely start where a new tensor does, at an aligned address."""

    def __init__(self) -> None:
        self._arrays: dict[fx.Node, bool] = {}

    def __call__(self, node: fx.Node) -> bool:
        """Whether ``node``'s value does. What a graph is given does so if it did in the recorded run."""
        chain: list[fx.Node] = []
        while node.target in WRITES and node not in self._arrays:  # a copy that starts as its array does
            chain.append(node)
            assert isinstance(node.args[0], fx.Node)
            node = node.args[0]
        known = self._arrays.get(node)
        if known is None:
            known = node.meta.get("phase") == 0 if node.op in ("placeholder", "get_attr") else _owns_memory(node)
        for each in chain:
            self._arrays[each] = known
        return known


class Phases:
    """How far past an aligned address the values of a graph start, in bytes, as far as the graph tells; else 0.

    It tells of what the recorded run was given, and of views of it, of what was written into it and of new tensors.
    """

    def __init__(self) -> None:
        self._arrays: dict[fx.Node, fx.Node] = {}  # each state of an array that is written -> its first

    def __call__(self, node: fx.Node) -> int:
        """The phase of one value (:func:`fxjacobi.placement.phase_of`)."""
        past = 0
        while node.target in _FROM_THE_START or node.target in _PARTS:
            if node.target in WRITES:
                node = self._array(node)
                continue
            source = node.all_input_nodes[0]
            if node.target in _PARTS:
                _, dim, start = (*node.args, 0, 0)[:3]
                spec = spec_of(source)
                if not isinstance(spec, TensorSpec) or type(dim) is not int or type(start) is not int:
                    return 0
                start = min(start if start >= 0 else start + spec.shape[dim], spec.shape[dim])
                past += start * spec.stride[dim] * spec.dtype.itemsize
            node = source
        spec = spec_of(node)
        return int(node.meta.get("phase", 0) + past) % alignment(spec.device) if isinstance(spec, TensorSpec) else 0

    def _array(self, node: fx.Node) -> fx.Node:
        chain = []
        while node.target in WRITES and node not in self._arrays:
            chain.append(node)
            assert isinstance(node.args[0], fx.Node)
            node = node.args[0]
        first = self._arrays.get(node, node)
        self._arrays.update(dict.fromkeys(chain, first))
        return first


def _owns_memory(node: fx.Node) -> bool:
    """Whether ``node``'s value is surely a tensor with memory of its own, which the allocator has aligned."""
    return node.op == "call_function" and (
        node.target is restride
        or (
            isinstance(node.target, torch._ops.OpOverload)
            and node.target not in _VIEWS
            and all(argument.alias_info is None for argument in node.target._schema.arguments)
        )
    )
