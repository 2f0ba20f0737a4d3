"""Ways that are known for operations by what they are: pointwise, along dimensions, over a batch, with literals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi import batched
from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.operation import Env, Operation, Way, arguments, expanded, rank_of, record, small_graph, with_rank
from fxjacobi.products import products

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["rules", "rules_for_literals"]

aten = torch.ops.aten

# Operations that take dimensions by number and treat the others alike: the new dimension shifts the numbers.
_SHIFTED = frozenset(
    {
        aten.select.int, aten.slice.Tensor, aten.view.default, aten._unsafe_view.default, aten.reshape.default,
        aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.transpose.int, aten.permute.default,
        aten.expand.default, aten.cat.default, aten.stack.default, aten.split.Tensor, aten.split_with_sizes.default,
        aten.unbind.int, aten.clone.default, aten.alias.default, aten.detach.default, aten._to_copy.default,
        aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default, aten.max.dim, aten.min.dim,
        aten._softmax.default, aten._log_softmax.default, aten.cumsum.default, aten.logsumexp.default,
        aten.gather.default, aten.sort.default, aten.topk.default, aten.flip.default, aten.prod.dim_int,
        aten.any.dim, aten.all.dim, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    }
)  # fmt: skip


# Operations whose named arguments have a batch as their first dimension, as have all outputs.
_FOLDED: dict[Any, tuple[int, ...]] = {
    aten.convolution.default: (0,),
    aten.native_group_norm.default: (0,),
    aten._native_batch_norm_legit_no_training.default: (0,),
    aten.max_pool2d_with_indices.default: (0,),
    aten.avg_pool2d.default: (0,),
    aten.upsample_nearest2d.default: (0,),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (0, 1, 2),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (0, 1, 2),
    aten.native_layer_norm.default: (0,),
    aten._softmax.default: (0,),
    aten._log_softmax.default: (0,),
}


# Operations that read leading dimensions as a batch already.
_LEADING: dict[Any, tuple[int, ...]] = {aten.native_layer_norm.default: (0,), aten.embedding.default: (1,)}


_DIMENSIONS = frozenset({"dim", "dim0", "dim1", "dims"})
_SIZES = frozenset({"size", "shape"})


_SIZES = frozenset({"size", "shape"})


# A number that changes from step to step stands for a tensor in these.
_TENSOR_FORM: dict[Any, Any] = {
    getattr(packet, overload): packet.Tensor
    for packet in (
        aten.add, aten.sub, aten.mul, aten.div, aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.remainder,
    )
    for overload in ("Scalar", "Tensor")
} | {aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor}  # fmt: skip


def rules(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
    """Yield the ways that are known for an operation without literals."""
    target = operation.node.target
    if _is_pointwise(target):
        yield Way.DIRECT, small_graph(operation, lambda env: _aligned(operation, env))
        yield Way.ROWS_APART, small_graph(operation, lambda env: _rows_apart(operation, env))
    elif target in _SHIFTED and (shifted := _shifted(operation)) is not None:
        yield Way.DIRECT, shifted
    elif target is aten.t.default:
        yield Way.DIRECT, small_graph(operation, lambda env: _transposed(operation, env))
    yield from _leading(operation)
    yield from products(operation)
    yield from _folded(operation)


def _is_pointwise(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _aligned(operation: Operation, env: Env) -> Any:
    rank = rank_of(operation)
    aligned = {n: with_rank(operation, n, env, rank) for n in operation.inputs}
    args, kwargs = arguments(operation, aligned)
    return operation.node.target(*args, **kwargs)  # type: ignore[operator]


def _rows_apart(operation: Operation, env: Env) -> Any:
    rank = rank_of(operation)
    aligned = {n: with_rank(operation, n, env, rank) for n in operation.inputs}
    args, kwargs = arguments(operation, aligned)
    if kwargs:
        return _aligned(operation, env)
    return record(batched.rows_apart, operation.node.target, operation.shape(operation.node), *args)


def _shifted(operation: Operation) -> fx.GraphModule | None:
    """Shift the dimensions that the arguments name by one."""
    target: Any = operation.node.target
    output = spec_of(operation.node)
    named: dict[str, Any] = {a.name: v for a, v in zip(target._schema.arguments, operation.node.args, strict=False)}
    named |= operation.node.kwargs
    # These return as many dimensions as ``dim`` may count, plus one.
    grows = target in (aten.unsqueeze.default, aten.stack.default)
    rank = len(operation.shape(operation.tensors[0])) + grows
    if rank == 0 and any(name in _DIMENSIONS for name in named):
        return None
    for argument in target._schema.arguments:
        if argument.name in _DIMENSIONS and argument.name not in named and argument.has_default_value():
            named[argument.name] = argument.default_value
    for name, value in named.items():
        if isinstance(value, fx.Node) and value not in operation.tensors and name in _DIMENSIONS | _SIZES:
            return None
        if name in _DIMENSIONS:
            if value is None or (isinstance(value, (list, tuple)) and not value):
                return None
            many = isinstance(value, (list, tuple))
            shifted = [int(d) % rank + 1 for d in (value if many else [value])]
            if target is aten.permute.default:
                shifted = [0, *shifted]
            named[name] = shifted if many else shifted[0]
        elif name in _SIZES:
            if not isinstance(output, TensorSpec):
                return None
            named[name] = [operation.steps, *output.shape]

    def build(env: Env) -> Any:
        everywhere = {n: expanded(operation, n, env) for n in operation.inputs}
        if target is aten.expand.default:
            node = operation.tensors[0]
            ones = len(operation.shape(operation.node)) - len(operation.shape(node))
            everywhere[node] = aten.reshape.default(
                everywhere[node], [operation.steps, *[1] * ones, *operation.shape(node)]
            )
        positional = [a.name for a in target._schema.arguments if not a.kwarg_only and a.name in named]
        args: Any = fx.map_arg(tuple(named[name] for name in positional), lambda n: everywhere[n])
        kwargs: Any = fx.map_arg({k: v for k, v in named.items() if k not in positional}, lambda n: everywhere[n])
        return target(*args, **kwargs)

    return small_graph(operation, build)


def _transposed(operation: Operation, env: Env) -> Any:
    (node,) = operation.inputs
    return aten.transpose.int(env[node], 1, 2) if len(operation.shape(node)) == 2 else env[node]


def _leading(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
    positions = _LEADING.get(operation.node.target)
    if positions is not None:
        args = operation.node.args
        if all(operation.is_batched(args[i]) == (i in positions) for i, a in enumerate(args) if isinstance(a, fx.Node)):
            yield Way.DIRECT, small_graph(operation, lambda env: _plain(operation, env))


def _plain(operation: Operation, env: Env) -> Any:
    args, kwargs = arguments(operation, env)
    return operation.node.target(*args, **kwargs)  # type: ignore[operator]


def _folded(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
    """Fold the steps into the first dimension."""
    target, steps = operation.node.target, operation.steps
    args: tuple[Any, ...] = operation.node.args
    positions = _FOLDED.get(target)
    if positions is None:
        return
    for i, argument in enumerate(args):
        if operation.is_batched(argument) and i not in positions:
            return
    if any(operation.is_batched(n) for n in operation.node.kwargs.values()):
        return
    shapes = [operation.shape(args[i]) for i in positions]
    if any(len(shape) < 2 for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        return
    if target in (aten._softmax.default, aten._log_softmax.default) and args[1] % len(shapes[0]) == 0:
        return
    if target is aten.native_layer_norm.default and len(args[1]) == len(shapes[0]):
        return

    def build(env: Env) -> Any:
        new: list[Any] = list(arguments(operation, env)[0])
        for i, shape in zip(positions, shapes, strict=True):
            value = expanded(operation, args[i], env)
            new[i] = aten.reshape.default(value, [steps * shape[0], *shape[1:]])
        if target is aten.native_group_norm.default:
            new[3] = steps * new[3]
        kwargs = arguments(operation, env)[1]
        result = target(*new, **kwargs)  # type: ignore[operator]
        spec = spec_of(operation.node)
        if isinstance(spec, TensorSpec):
            return aten.reshape.default(result, [steps, *spec.shape])
        assert spec is not None
        return tuple(
            aten.reshape.default(result[i], [steps, *part.shape])
            if isinstance(part, TensorSpec) and part.shape[:1] == shapes[0][:1]
            else result[i]
            for i, part in enumerate(spec)
        )

    yield Way.FLATTENED, small_graph(operation, build)


def rules_for_literals(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
    """Operations with one Python value a step."""
    node, steps = operation.node, operation.steps
    args: tuple[Any, ...] = node.args
    target: Any = node.target
    if target in _TENSOR_FORM and len(args) == 2 and args[0] in operation.tensors and args[1] not in operation.tensors:
        values = operation.literals[args[1]]
        value = args[0]
        rank = len(operation.shape(value))

        def build(env: Env) -> Any:
            number = record(batched.numbers, values, [steps, *[1] * rank], env[value])
            return _TENSOR_FORM[target](env[value], number, **node.kwargs)

        spec = spec_of(value)
        assert isinstance(spec, TensorSpec)
        if spec.dtype.is_floating_point or all(isinstance(v, int) for v in values):
            yield Way.DIRECT, small_graph(operation, build)
    elif node.target is aten.select.int and isinstance(args[2], fx.Node) and isinstance(args[1], int):
        value, indices = args[0], _compact(operation.literals[args[2]])
        dim = args[1] % len(operation.shape(value))
        function = batched.select_own if operation.is_batched(value) else batched.select_each
        yield Way.GATHERED, small_graph(operation, lambda env: record(function, env[value], dim, indices))
    elif node.target is aten.slice.Tensor and not operation.is_batched(args[0]):
        value, dim = args[0], args[1] if len(args) > 1 else 0
        size, length = operation.shape(value)[dim], operation.shape(node)[dim]
        starts = _per_step(operation, args[2] if len(args) > 2 else 0)
        if (args[4] if len(args) > 4 else 1) == 1 and all(isinstance(s, int) for s in starts):
            first = tuple(range(size)[slice(s, None)].start for s in starts)
            yield (
                Way.GATHERED,
                small_graph(operation, lambda env: record(batched.slice_each, env[value], dim, first, length)),
            )


def _per_step(operation: Operation, argument: Any) -> tuple[Any, ...]:
    if isinstance(argument, fx.Node):
        return operation.literals.get(argument, (None,))
    return (argument,) * operation.steps


def _compact(indices: tuple[Any, ...]) -> Sequence[int]:
    """Return ``indices`` as a range where they are one, which a view can serve."""
    if len(indices) > 1 and indices[0] >= 0:
        step = indices[1] - indices[0]
        if step > 0 and indices == tuple(range(indices[0], indices[0] + step * len(indices), step)):
            return range(indices[0], indices[-1] + 1, step)
    return indices
