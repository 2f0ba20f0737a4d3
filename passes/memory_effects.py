"""On which properties of its memory a value's later use may depend, beyond its elements.

The last bits of a result may depend on where its arguments lie. Measured on the CPU: a small matrix product rounds by
the alignment of its rows (64 bytes and other offsets differ), a vectorised function such as ``sigmoid`` by whether an
element falls into a full vector, that is by shape and strides; sums and products of elements do not.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import fx

from fxjacobi.ops import GUARDS, restride, write

__all__ = ["Need", "Needs", "owns_memory"]

_aten = torch.ops.aten

_BY_ELEMENT = frozenset(
    {
        _aten.add.Tensor, _aten.add.Scalar, _aten.sub.Tensor, _aten.sub.Scalar, _aten.rsub.Scalar, _aten.mul.Tensor,
        _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar, _aten.neg.default, _aten.abs.default, _aten.relu.default,
        _aten.maximum.default, _aten.minimum.default, _aten.clamp.default, _aten.where.self, _aten.sign.default,
        _aten.eq.Tensor, _aten.eq.Scalar, _aten.ne.Scalar, _aten.lt.Scalar, _aten.le.Scalar, _aten.gt.Scalar,
        _aten.ge.Scalar, _aten.lt.Tensor, _aten.le.Tensor, _aten.gt.Tensor, _aten.ge.Tensor, _aten.floor.default,
        _aten.cat.default, _aten.stack.default, _aten.index_select.default, _aten.embedding.default,
        write, restride, *GUARDS,
    }
)  # fmt: skip
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


class Need(IntEnum):
    """What a use may depend on."""

    ELEMENTS = 0
    LAYOUT = 1
    ALIGNMENT = 2


class Needs:
    """What the uses of a graph's nodes may depend on, views of them included."""

    def __init__(self) -> None:
        self._known: dict[fx.Node, Need] = {}

    def of(self, node: fx.Node) -> Need:
        """The most that any use of ``node`` may depend on."""
        found = self._known.get(node)
        if found is None:
            found = self._known[node] = max((self._by(user) for user in node.users), default=Need.ELEMENTS)
        return found

    def _by(self, user: fx.Node) -> Need:
        if user.op == "output" or user.target in _BY_ELEMENT:
            return Need.ELEMENTS
        if user.target in _VIEWS:
            return max(self.of(user), Need.LAYOUT if user.target is _aten.as_strided.default else Need.ELEMENTS)
        if user.target in _BY_LAYOUT:
            return Need.LAYOUT
        pointwise = isinstance(user.target, torch._ops.OpOverload) and torch.Tag.pointwise in user.target.tags
        return Need.LAYOUT if pointwise else Need.ALIGNMENT


def owns_memory(node: fx.Node) -> bool:
    """Whether ``node``'s value is surely a tensor with memory of its own, which the allocator has aligned."""
    return node.op == "call_function" and (
        node.target in (write, restride)
        or (
            isinstance(node.target, torch._ops.OpOverload)
            and node.target not in _VIEWS
            and all(argument.alias_info is None for argument in node.target._schema.arguments)
        )
    )
