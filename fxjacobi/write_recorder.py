"""Recording what an operation wrote: the functional operation that computes it, and where it goes."""

from __future__ import annotations

from operator import getitem as _getitem
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi import ops
from fxjacobi.functional import functional_counterpart
from fxjacobi.graph import TensorSpec, spec_of_value
from fxjacobi.layouts import contiguous_strides
from fxjacobi.memory import tensor_spec
from fxjacobi.out_of_place import dtype_out_of_place, spec_out_of_place

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from fxjacobi.errors import CaptureError
    from fxjacobi.functional import Mutation
    from fxjacobi.memory import Memory

__all__ = ["BATCH_NORMS", "WriteRecorder"]

aten = torch.ops.aten

BATCH_NORMS = {aten.native_batch_norm.default, aten.cudnn_batch_norm.default, aten.miopen_batch_norm.default}
_DRAWS = {
    aten.uniform_.default, aten.normal_.default, aten.exponential_.default, aten.bernoulli_.float,
    aten.random_.default, aten.random_.to, getattr(aten.random_, "from"),
    aten.geometric_.default, aten.cauchy_.default, aten.log_normal_.default,
}  # fmt: skip


class WriteRecorder:
    """Records writes into ``memory``'s graph.

    Args:
        memory: The graph, and which of its nodes every tensor's present value is.
        refuse: Returns the error for something that cannot be recorded.
    """

    def __init__(self, memory: Memory, refuse: Callable[..., CaptureError]) -> None:
        self.memory = memory
        self.refuse = refuse

    def record(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        nodes: tuple[Any, ...],
        keywords: dict[str, Any],
        mutation: Mutation,
    ) -> bool:
        """Record the operation ``func``, which has run; return whether it wrote to anything.

        Args:
            func: The operation.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            nodes: The graph's values of the positional arguments before the run.
            keywords: Those of the keyword arguments.
            mutation: What its schema says it writes to.

        Raises:
            CaptureError: The write has no functional form.
        """
        targets = [args[p] for p in mutation.positions if p < len(args)]
        targets += [kwargs[k] for k in mutation.keywords if k in kwargs]
        if any(not isinstance(t, torch.Tensor) for t in targets if t is not None):
            raise self.refuse(f"{func} writes to a list of tensors", "write to them one by one")
        targets = [t for t in targets if t is not None]
        if not targets:  # optional outputs that were not given: an ordinary operation
            return False
        target = targets[0]
        if func is aten.copy_.default and self.memory.lookup(target) is nodes[1]:
            return True  # x[0] += 1 ends by copying the view onto itself
        if func is aten.copy_.default:
            self.memory.assign(target, self._as(nodes[1], target), shared=True)
            return True
        elif func in (aten.fill_.Scalar, aten.zero_.default):
            fill = nodes[1] if len(nodes) > 1 else 0
            value = self.memory.emit(
                aten.full.default, (list(target.shape), fill), {"dtype": target.dtype, "device": target.device},
                TensorSpec(tuple(target.shape), target.dtype, target.device, contiguous_strides(tuple(target.shape))),
            )  # fmt: skip
        elif func in _DRAWS and not target.is_contiguous():
            layout = (list(target.shape), list(target.stride()), target.dtype, target.device)
            value = self.memory.emit(ops.draw, (func, *layout, *nodes[1:]), keywords, tensor_spec(target))
        elif func is aten.fill_.Tensor:
            self.memory.assign(target, self._as(nodes[1], target), shared=True)
            return True
        else:
            functional = functional_counterpart(func)
            if functional is None:
                raise self.refuse(f"{func} writes in place and has no functional form", "use an out-of-place operation")
            # The dispatcher drops arguments that equal their defaults; the functional form may have no default.
            positional = [a for a in func._schema.arguments if not a.kwarg_only]
            nodes = (*nodes, *[a.default_value for a in positional[len(nodes) :]])
            rest = {key: item for key, item in keywords.items() if key not in mutation.keywords}
            returns = len(functional._schema.returns)
            if returns != len(targets):
                raise self.refuse(f"{func} writes to {len(targets)} tensors and returns {returns}")
            if returns > 1:
                call = self.memory.emit(functional, nodes, rest, tuple(spec_of_value(t) for t in targets))
                for position, each in enumerate(targets):
                    self.memory.assign(each, self.memory.emit(_getitem, (call, position), {}, spec_of_value(each)))
                return True
            dtype = dtype_out_of_place(functional, args, target)
            spec = spec_out_of_place(functional, args, target)
            value = self.memory.emit(functional, nodes, rest, TensorSpec(spec.shape, dtype, spec.device, spec.stride))
            if dtype != target.dtype:
                value = self.memory.emit(aten._to_copy.default, (value,), {"dtype": target.dtype}, spec)
        self.memory.assign(target, value)
        return True

    def _as(self, node: fx.Node, target: torch.Tensor) -> fx.Node:
        """The value of ``node`` with ``target``'s dtype, device and shape."""
        spec = node.meta["spec"]
        if spec.dtype != target.dtype or spec.device != target.device:
            cast = {"dtype": target.dtype, "device": target.device}
            spec = TensorSpec(spec.shape, target.dtype, target.device, spec.stride)
            node = self.memory.emit(aten._to_copy.default, (node,), cast, spec)
        if spec.shape != tuple(target.shape):
            lead = target.dim() - len(spec.shape)
            if lead < 0:  # copy_ drops leading dimensions of size one
                node = self.memory.emit(
                    aten.reshape.default, (node, list(spec.shape[-lead:])), {}, spec_of_value(target)
                )
            stride = tuple(
                0 if d < lead or spec.shape[d - lead] != size else spec.stride[d - lead]
                for d, size in enumerate(target.shape)
            ) if lead >= 0 else tuple(target.stride())  # fmt: skip
            expanded = TensorSpec(tuple(target.shape), target.dtype, target.device, stride)
            node = self.memory.emit(aten.expand.default, (node, list(target.shape)), {}, expanded)
        return node

    def record_batch_norm(self, func: Any, args: tuple[Any, ...], nodes: tuple[Any, ...], result: Any) -> None:
        """Batch normalisation in training mode updates its running statistics without its schema saying so."""
        if func is not aten.native_batch_norm.default:
            raise self.refuse(f"{func} updates running statistics below the dispatcher", "use eval mode")
        specs = (*(spec_of_value(item) for item in result), spec_of_value(args[3]), spec_of_value(args[4]))
        call = self.memory.emit(aten._native_batch_norm_legit_functional.default, nodes, {}, specs)
        for position, item in enumerate(result):
            self.memory.add_fresh(item, self.memory.emit(_getitem, (call, position), {}, specs[position]))
        for position in (3, 4):
            self.memory.assign(args[position], self.memory.emit(_getitem, (call, position), {}, specs[position]))
