"""The ways to evaluate one operation for all T steps at once, none of them believed: exactness measures them.

A value in a map's body is, at T steps, *batched* ``(T, ...)``, *uniform* (the same at every step) or a *literal* (one
Python value a step). Each way is a small graph from the operation's batched and uniform inputs to its batched output.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx
from torch._C import _functorch

from fxjacobi import batched, ops
from fxjacobi.emit import is_dense, rebuilt
from fxjacobi.graph import TensorSpec, spec_of, stamp
from fxjacobi.loops import Invariant, Literal, Loop, Scanned, Stacked, align_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fxjacobi.loops import Binding

__all__ = ["Operation", "Role", "Way", "ways_of"]

aten = torch.ops.aten


class Way(Enum):
    """How an operation of T equations is evaluated."""

    DIRECT = "the operation itself, on the stacked values"
    FLATTENED = "the steps folded into the rows or the batch of one call"
    BATCHED_MATMUL = "one slice a step of a batched matrix product"
    ALIGNED_MATMUL = "the same, each slice aligned in memory as a tensor of its own"
    GATHERED = "one gather in place of T indexings"
    MAPPED = "the operation under torch.func.vmap"
    ROWS_APART = "one strided row a step, so that each has its own scalar tail"
    INTERCHANGED = "the inner loop once, each of its steps for all outer steps"
    ONE_BY_ONE = "step by step, then stacked"


class Role(Enum):
    """What a value of the body is over T steps."""

    BATCHED = "one tensor a step, stacked"
    UNIFORM = "the same at every step"
    LITERAL = "one Python value a step"


@dataclass(frozen=True)
class Operation:
    """One node of a map's body, with the role of each node that it reads.

    Args:
        node: The node; not all of its inputs are uniform.
        steps: The number of equations T.
        roles: The role of each input.
        literals: The values of each literal input.
        owner: The module whose graph the node is of.
    """

    node: fx.Node
    steps: int
    roles: Mapping[fx.Node, Role]
    literals: Mapping[fx.Node, tuple[Any, ...]]
    owner: fx.GraphModule

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The tensors it reads."""
        return tuple(n for n in self.node.all_input_nodes if self.roles[n] is not Role.LITERAL)

    @property
    def tensors(self) -> tuple[fx.Node, ...]:
        """Those of its inputs that are tensors; a number that is the same at every step is none."""
        return tuple(n for n in self.inputs if isinstance(spec_of(n), TensorSpec))

    @property
    def has_literals(self) -> bool:
        """Whether a Python value among its arguments changes from step to step."""
        return any(self.roles[n] is Role.LITERAL for n in self.node.all_input_nodes)

    def is_batched(self, argument: Any) -> bool:
        """Whether ``argument`` is a batched node."""
        return isinstance(argument, fx.Node) and self.roles[argument] is Role.BATCHED

    def shape(self, argument: Any) -> tuple[int, ...]:
        """Shape of a tensor argument at one step."""
        spec = spec_of(argument)
        assert isinstance(spec, TensorSpec)
        return spec.shape


_Env: TypeAlias = dict[fx.Node, Any]


def _node_of(value: Any) -> Any:
    return value.node if isinstance(value, fx.Proxy) else value


def _graph(operation: Operation, build: Callable[[_Env], Any]) -> fx.GraphModule:
    """Record what ``build`` does with proxies of the operation's inputs."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    env = {n: fx.Proxy(graph.placeholder(n.name), tracer) for n in operation.inputs}
    result = build(env)
    graph.output(fx.node.map_aggregate(result, _node_of))
    return fx.GraphModule({}, graph)


def _record(function: Callable[..., Any], *args: Any) -> fx.Proxy:
    """Append a call of a function of :mod:`fxjacobi.batched`."""
    proxy = next(a for a in args if isinstance(a, fx.Proxy))
    return proxy.tracer.create_proxy("call_function", function, args, {})


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

# A number that changes from step to step stands for a tensor in these.
_TENSOR_FORM: dict[Any, Any] = {
    getattr(packet, overload): packet.Tensor
    for packet in (
        aten.add, aten.sub, aten.mul, aten.div, aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge, aten.remainder,
    )
    for overload in ("Scalar", "Tensor")
} | {aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor}  # fmt: skip


def ways_of(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
    """Yield each way that is known for ``operation``; the last one always works."""
    found = False
    if operation.node.op == "call_function":
        for way in _with_literals(operation) if operation.has_literals else _rules(operation):
            found = True
            yield way
        if not found and not operation.has_literals:
            # Tracing costs milliseconds and its imports seconds, so it is left for what no rule covers.
            yield from _mapped(operation)
    yield Way.ONE_BY_ONE, _one_by_one(operation)


def _rules(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
    target = operation.node.target
    if _is_pointwise(target):
        yield Way.DIRECT, _graph(operation, lambda env: _aligned(operation, env))
        yield Way.ROWS_APART, _graph(operation, lambda env: _rows_apart(operation, env))
    elif target in _SHIFTED and (shifted := _shifted(operation)) is not None:
        yield Way.DIRECT, shifted
    elif target is aten.t.default:
        yield Way.DIRECT, _graph(operation, lambda env: _transposed(operation, env))
    yield from _leading(operation)
    yield from _products(operation)
    yield from _folded(operation)


def _is_pointwise(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags


def _arguments(operation: Operation, env: _Env) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: Any = fx.map_arg(operation.node.args, lambda n: env[n])
    kwargs: Any = fx.map_arg(operation.node.kwargs, lambda n: env[n])
    return args, kwargs


def _rank(operation: Operation) -> int:
    return max(len(operation.shape(n)) for n in operation.tensors)


def _with_rank(operation: Operation, node: fx.Node, env: _Env, rank: int) -> Any:
    """Put ones between a batched value's steps and its own dimensions, so that it broadcasts as at one step."""
    if operation.roles[node] is Role.UNIFORM or len(operation.shape(node)) == rank:
        return env[node]
    shape = operation.shape(node)
    return aten.reshape.default(env[node], [operation.steps, *[1] * (rank - len(shape)), *shape])


def _aligned(operation: Operation, env: _Env) -> Any:
    rank = _rank(operation)
    aligned = {n: _with_rank(operation, n, env, rank) for n in operation.inputs}
    args, kwargs = _arguments(operation, aligned)
    return operation.node.target(*args, **kwargs)  # type: ignore[operator]


def _rows_apart(operation: Operation, env: _Env) -> Any:
    rank = _rank(operation)
    aligned = {n: _with_rank(operation, n, env, rank) for n in operation.inputs}
    args, kwargs = _arguments(operation, aligned)
    if kwargs:
        return _aligned(operation, env)
    return _record(batched.rows_apart, operation.node.target, operation.shape(operation.node), *args)


def _expanded(operation: Operation, node: fx.Node, env: _Env) -> Any:
    """Return ``node`` with a leading dimension of T, whatever its role."""
    if operation.roles[node] is Role.BATCHED or node not in operation.tensors:
        return env[node]
    return aten.expand.default(env[node], [operation.steps, *operation.shape(node)])


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

    def build(env: _Env) -> Any:
        everywhere = {n: _expanded(operation, n, env) for n in operation.inputs}
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

    return _graph(operation, build)


def _transposed(operation: Operation, env: _Env) -> Any:
    (node,) = operation.inputs
    return aten.transpose.int(env[node], 1, 2) if len(operation.shape(node)) == 2 else env[node]


def _leading(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
    positions = _LEADING.get(operation.node.target)
    if positions is not None:
        args = operation.node.args
        if all(operation.is_batched(args[i]) == (i in positions) for i, a in enumerate(args) if isinstance(a, fx.Node)):
            yield Way.DIRECT, _graph(operation, lambda env: _plain(operation, env))


def _plain(operation: Operation, env: _Env) -> Any:
    args, kwargs = _arguments(operation, env)
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

    def build(env: _Env) -> Any:
        new: list[Any] = list(_arguments(operation, env)[0])
        for i, shape in zip(positions, shapes, strict=True):
            value = _expanded(operation, args[i], env)
            new[i] = aten.reshape.default(value, [steps * shape[0], *shape[1:]])
        if target is aten.native_group_norm.default:
            new[3] = steps * new[3]
        kwargs = _arguments(operation, env)[1]
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

    yield Way.FLATTENED, _graph(operation, build)


def _products(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
    """Matrix products: rows of one larger product, or slices of a batched one."""
    target, steps = operation.node.target, operation.steps
    args: tuple[Any, ...] = operation.node.args
    bias: fx.Node | None
    match target:
        case aten.mm.default | aten.mv.default:
            bias, (left, right), kwargs = None, args[:2], {}
        case aten.addmm.default | aten.addmv.default:
            bias, (left, right), kwargs = args[0], args[1:3], dict(operation.node.kwargs)
        case _:
            return
    vector = target in (aten.mv.default, aten.addmv.default)
    shape = operation.shape(operation.node)

    def rows(env: _Env) -> Any:
        """(T, m, k) x (k, n) as (T m, k) x (k, n)."""
        m, k = operation.shape(left)
        folded = aten.reshape.default(env[left], [steps * m, k])
        if bias is None:
            product = aten.mm.default(folded, env[right])
        else:
            added = env[bias]
            if operation.roles[bias] is Role.BATCHED or len(operation.shape(bias)) == 2:
                wide = _with_rank(operation, bias, env, 2)
                added = aten.reshape.default(aten.expand.default(wide, [steps, *shape]), [steps * m, shape[-1]])
            product = aten.addmm.default(added, folded, env[right], **kwargs)
        return aten.reshape.default(product, [steps, *shape])

    def vectors(env: _Env) -> Any:
        """(m, k) x (T, k) as (T, k) x (k, m)."""
        turned = aten.t.default(env[left])
        if bias is None:
            return aten.mm.default(env[right], turned)
        return aten.addmm.default(env[bias], env[right], turned, **kwargs)

    def slices(env: _Env, align: Callable[[fx.Node, Any], Any] = lambda _node, value: value) -> Any:
        a, b = (align(n, _expanded(operation, n, env)) for n in (left, right))
        if vector:
            b = aten.unsqueeze.default(b, 2)
        if bias is None:
            product = aten.bmm.default(a, b)
        else:
            full = aten.expand.default(_with_rank(operation, bias, env, len(shape)), [steps, *shape])
            added = aten.unsqueeze.default(full, 2) if vector else full
            product = aten.baddbmm.default(added, a, b, **kwargs)
        return aten.squeeze.dim(product, 2) if vector else product

    if operation.roles[right] is Role.UNIFORM and not vector:
        yield Way.FLATTENED, _graph(operation, rows)
    if operation.roles[left] is Role.UNIFORM and vector:
        yield Way.FLATTENED, _graph(operation, vectors)
    yield Way.BATCHED_MATMUL, _graph(operation, slices)

    def aligned(node: fx.Node, value: Any) -> Any:
        return _record(align_rows, value) if operation.roles[node] is Role.BATCHED else value

    yield Way.ALIGNED_MATMUL, _graph(operation, lambda env: slices(env, aligned))


def _single(operation: Operation, *, literals: bool = False, relaid: bool = False) -> fx.GraphModule:
    """Return the operation alone as a graph of its inputs: literals too, and each in its own layout, if asked."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in operation.node.all_input_nodes:
        if literals or operation.roles[node] is not Role.LITERAL:
            env[node] = stamp(graph.placeholder(node.name), spec_of(node))
            spec = spec_of(node)
            if relaid and operation.is_batched(node) and isinstance(spec, TensorSpec) and not is_dense(spec):
                # The stack has dense slices; the kernel of a single step saw this layout.
                env[node] = stamp(graph.call_function(ops.restride, (env[node], spec.stride)), spec)
    copy = graph.node_copy(operation.node, env.__getitem__)
    spec = spec_of(operation.node)
    if isinstance(spec, TensorSpec) or spec is None:
        graph.output((copy,))
    else:
        parts = [stamp(graph.call_function(operator.getitem, (copy, i)), part) for i, part in enumerate(spec)]
        graph.output(tuple(part for part in parts if isinstance(spec_of(part), TensorSpec)))
    return rebuilt(operation.owner, graph, {})


def _as_value(operation: Operation, results: Sequence[Any]) -> Any:
    """Return the results of :func:`_single` as the value of the node."""
    spec = spec_of(operation.node)
    if isinstance(spec, TensorSpec):
        return results[0]
    assert spec is not None
    rest = iter(results)
    return tuple(next(rest) if isinstance(part, TensorSpec) else None for part in spec)


def _one_by_one(operation: Operation) -> fx.GraphModule:
    """The operation as a map of its own: its definition."""
    single = _single(operation, literals=True, relaid=True)
    bindings: list[Binding] = []
    for node in operation.node.all_input_nodes:
        match operation.roles[node]:
            case Role.LITERAL:
                bindings.append(Literal(operation.literals[node]))
            case Role.UNIFORM:
                bindings.append(Invariant(operation.inputs.index(node)))
            case Role.BATCHED:
                index = operation.inputs.index(node)
                bindings.append(Scanned(index, 0, range(operation.steps), owned=True))
    count = len(single.graph.output_node().args[0])  # type: ignore[arg-type]
    loop = Loop(single, operation.steps, bindings, [Stacked(i) for i in range(count)])
    graph = fx.Graph()
    call = graph.call_module("one_by_one", tuple(graph.placeholder(n.name) for n in operation.inputs))
    parts = [graph.call_function(operator.getitem, (call, i)) for i in range(count)]
    graph.output(_as_value(operation, parts))
    return fx.GraphModule({"one_by_one": loop}, graph)


def _mapped(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
    """Lower ``torch.func.vmap`` of the operation to ATen operations."""
    single = _single(operation)
    dims = tuple(0 if operation.roles[n] is Role.BATCHED else None for n in operation.inputs)
    examples = []
    for node, dim in zip(operation.inputs, dims, strict=True):
        spec = spec_of(node)
        if not isinstance(spec, TensorSpec):
            return
        shape = spec.shape if dim is None else (operation.steps, *spec.shape)
        stride = spec.stride
        if dim == 0:
            # The batched layout at run time is whatever the ways before leave; vmap is traced for any.
            stride = (max([s * n for s, n in zip(spec.stride, spec.shape, strict=True)], default=1), *spec.stride)
        examples.append(torch.empty_strided(shape, stride, dtype=spec.dtype, device=spec.device).zero_())
    from torch.fx.experimental.proxy_tensor import make_fx

    # A fallback would be T calls in disguise. (The setting is private; torch has no public form of it.)
    fallback: Any = _functorch
    enabled = fallback._is_vmap_fallback_enabled()
    fallback._set_vmap_fallback_enabled(False)
    try:
        lowered = make_fx(torch.func.vmap(single.forward, dims))(*examples)
    except (RuntimeError, NotImplementedError, ValueError, IndexError):
        # An operation without a batching rule, or one that refuses zeros: one way less.
        return
    finally:
        fallback._set_vmap_fallback_enabled(enabled)
    graph = lowered.graph
    if any(node.op == "get_attr" for node in graph.nodes):
        return
    output = graph.output_node()
    output.args = (_as_value(operation, output.args[0]),)  # type: ignore[arg-type]
    lowered.recompile()
    yield Way.MAPPED, lowered


def _with_literals(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
    """Operations with one Python value a step."""
    node, steps = operation.node, operation.steps
    args: tuple[Any, ...] = node.args
    target: Any = node.target
    if target in _TENSOR_FORM and len(args) == 2 and args[0] in operation.tensors and args[1] not in operation.tensors:
        values = operation.literals[args[1]]
        value = args[0]
        rank = len(operation.shape(value))

        def build(env: _Env) -> Any:
            number = _record(batched.numbers, values, [steps, *[1] * rank], env[value])
            return _TENSOR_FORM[target](env[value], number, **node.kwargs)

        spec = spec_of(value)
        assert isinstance(spec, TensorSpec)
        if spec.dtype.is_floating_point or all(isinstance(v, int) for v in values):
            yield Way.DIRECT, _graph(operation, build)
    elif node.target is aten.select.int and isinstance(args[2], fx.Node) and isinstance(args[1], int):
        value, indices = args[0], _compact(operation.literals[args[2]])
        dim = args[1] % len(operation.shape(value))
        function = batched.select_own if operation.is_batched(value) else batched.select_each
        yield Way.GATHERED, _graph(operation, lambda env: _record(function, env[value], dim, indices))
    elif node.target is aten.slice.Tensor and not operation.is_batched(args[0]):
        value, dim = args[0], args[1] if len(args) > 1 else 0
        size, length = operation.shape(value)[dim], operation.shape(node)[dim]
        starts = _per_step(operation, args[2] if len(args) > 2 else 0)
        if (args[4] if len(args) > 4 else 1) == 1 and all(isinstance(s, int) for s in starts):
            first = tuple(range(size)[slice(s, None)].start for s in starts)
            yield Way.GATHERED, _graph(operation, lambda env: _record(batched.slice_each, env[value], dim, first, length))


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
