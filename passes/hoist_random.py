"""Draw all random numbers first, in the program's order, so that the code that uses them is a function of them."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

from fxjacobi.assemble import assemble, copy_node
from fxjacobi.graph import Site, Spec, TensorSpec, is_random, site_of, spec_of, stamp
from fxjacobi.layouts import contiguous_strides, dense
from fxjacobi.loops import Loop
from fxjacobi.ops import draw, guard
from fxjacobi.passes.base import Pass, PassResult

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BlockedDraw", "HoistRandom", "blocked_draws", "hoist_random"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class HoistRandom(Pass):
    """Move draws to the front of the graph, after its placeholders and attributes.

    Fires on draws that take nothing from the run's values, and on those that equal, bit for bit, an operation on such
    a draw (each measured; float32 and float64)::

        multinomial(p, 1)      argmax(p / e)         e ~ exponential_() laid out as p is
        bernoulli(p)           (u < p)               u ~ uniform_()                                      (CPU)
        normal(mean, std)      n * std + mean        n ~ normal_()
        native_dropout(x, p)   x * b * (1 / (1 - p)) b ~ bernoulli_(1 - p)                               (CPU)

    and on ``rand_like`` and its kin, which take a layout only. The order of the draws stays the program's, so the same
    seed gives the same sample: a draw that cannot move stays, and all draws after it. The checks of the arguments that
    the originals make become guards.
    """

    name = "hoist_random"

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Hoist what can be hoisted."""
        return PassResult.of(hoist_random(module), module)


@dataclass(frozen=True, slots=True)
class BlockedDraw:
    """A draw that stays in its place, and why."""

    node: str
    site: Site | None
    reason: str


Emit: TypeAlias = "Callable[..., fx.Node]"


@dataclass(frozen=True, slots=True)
class _Free:
    """A draw that takes no value: a call, and what makes the original's result of it."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: Spec
    finish: Callable[[Emit, fx.Node, tuple[Any, ...]], fx.Node | tuple[fx.Node, fx.Node]] | None = None


def blocked_draws(module: fx.GraphModule) -> tuple[BlockedDraw, ...]:
    """Return the draws of ``module`` that :func:`hoist_random` leaves in their places."""
    return _plan(module)[1]


def hoist_random(module: fx.GraphModule) -> fx.GraphModule:
    """Return ``module`` with its draws first (see :class:`HoistRandom`), or ``module`` itself if they are already."""
    free, _ = _plan(module)
    seen_work = False
    in_place = True
    for node in module.graph.nodes:
        if node in free:
            in_place &= not seen_work and free[node].finish is None and free[node].target is node.target
        elif node.op not in ("placeholder", "get_attr"):
            seen_work = True
    return module if in_place else _Hoister(module, free).run()


def _plan(module: fx.GraphModule) -> tuple[dict[fx.Node, _Free], tuple[BlockedDraw, ...]]:
    """Which draws become which calls, and which stay."""
    free: dict[fx.Node, _Free] = {}
    blocked: list[BlockedDraw] = []
    draws: dict[Any, bool] = {}  # a recorded submodule is called many times
    for node in module.graph.nodes:
        if node.op == "call_module" and node.target not in draws:
            draws[node.target] = _draws(module.get_submodule(str(node.target)))
        if node.op == "call_module" and draws[node.target]:
            blocked.append(BlockedDraw(node.name, site_of(node), "it draws in a submodule's own order"))
        elif is_random(node):
            found = _free(node)
            if isinstance(found, str):
                blocked.append(BlockedDraw(node.name, site_of(node), found))
            elif blocked:
                blocked.append(BlockedDraw(node.name, site_of(node), f"{blocked[0].node} draws before it"))
            else:
                free[node] = found
    return free, tuple(blocked)


def _draws(module: torch.nn.Module) -> bool:
    graph_module = module.body if isinstance(module, Loop) else module
    return isinstance(graph_module, fx.GraphModule) and any(
        is_random(node) or (node.op == "call_module" and _draws(graph_module.get_submodule(str(node.target))))
        for node in graph_module.graph.nodes
    )


class _Hoister:
    """Emits leaves, draws and the rest, in this order."""

    def __init__(self, module: fx.GraphModule, free: dict[fx.Node, _Free]) -> None:
        self.module = module
        self.free = free
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}

    def run(self) -> fx.GraphModule:
        """Emit the graph."""
        leaves = [node for node in self.module.graph.nodes if node.op in ("placeholder", "get_attr")]
        for node in leaves:
            self.copy(node)
        drawn: dict[fx.Node, fx.Node] = {}
        for node, call in self.free.items():
            kwargs = fx.map_arg(call.kwargs, self.values.__getitem__)  # a generator is an attribute
            made = self.graph.create_node("call_function", call.target, call.args, kwargs)
            drawn[node] = stamp(made, call.spec, site_of(node))
        for node in self.module.graph.nodes:
            if node in drawn:
                finish = self.free[node].finish
                args = fx.map_arg(node.args, self.values.__getitem__)
                emit = _Emitter(self.graph, site_of(node))
                self.values[node] = drawn[node] if finish is None else finish(emit, drawn[node], args)
            elif node.target is operator.getitem and isinstance(self.values[node.args[0]], tuple):
                self.values[node] = self.values[node.args[0]][node.args[1]]
            elif node not in self.values:
                self.copy(node)
        return assemble(self.graph, self.module)

    def copy(self, node: fx.Node) -> None:
        args = fx.map_arg(node.args, self.values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self.values.__getitem__)
        self.values[node] = copy_node(self.graph, node, args, kwargs)


@dataclass(frozen=True, slots=True)
class _Emitter:
    """Appends operations for one site."""

    graph: fx.Graph
    site: Site | None = field(default=None)

    def __call__(self, target: Any, args: tuple[Any, ...], spec: Spec, kwargs: dict[str, Any] | None = None) -> fx.Node:
        return stamp(self.graph.call_function(target, args, kwargs or {}), spec, self.site)

    def check(self, valid: fx.Node, like: TensorSpec) -> None:
        """Guard that all of ``valid`` holds."""
        every = self(_aten.all.default, (valid,), dense(_boolean(like), ()))
        self(guard, (every, True), None)


def _boolean(like: TensorSpec) -> TensorSpec:
    return TensorSpec(like.shape, torch.bool, like.device, like.stride)


# What each draw is when its values come last

_IN_PLACE: dict[Any, Any] = {
    _aten.bernoulli.p: _aten.bernoulli_.float,
    _aten.exponential.default: _aten.exponential_.default,
    _aten.uniform.default: _aten.uniform_.default,
    _aten.normal_functional.default: _aten.normal_.default,
    _aten.geometric.default: _aten.geometric_.default,
    _aten.log_normal.default: _aten.log_normal_.default,
    _aten.cauchy.default: _aten.cauchy_.default,
    _aten.random.to: _aten.random_.to,
    _aten.random.default: _aten.random_.default,
    _aten.rand_like.default: _aten.uniform_.default,
    _aten.randn_like.default: _aten.normal_.default,
    _aten.randint_like.default: _aten.random_.to,
}
"""Draws that take from their first argument a layout and no value, as the in-place operation that fills it."""


def _free(node: fx.Node) -> _Free | str:
    """The draw that takes no value and gives ``node``'s result, or why there is none."""
    spec = spec_of(node)
    generator = {"generator": node.kwargs["generator"]} if node.kwargs.get("generator") is not None else {}
    if all(each is generator.get("generator") for each in node.all_input_nodes):
        return _Free(node.target, node.args, dict(node.kwargs), spec)
    target = node.target
    if target in _IN_PLACE and isinstance(spec, TensorSpec) and not any(map(_is_node, node.args[1:])):
        return _filled(_IN_PLACE[target], spec, generator, *node.args[1:])
    rewrite = _REWRITES.get(target)
    if rewrite is None:
        return "its values depend on the run's"
    if rewrite is _from:
        return rewrite(node, generator)
    tensors = [spec_of(item) for item in node.all_input_nodes]
    dtypes = {item.dtype for item in tensors if isinstance(item, TensorSpec)}
    if len(dtypes) != 1 or not dtypes <= {torch.float32, torch.float64}:
        return "it is rewritten only for arguments of dtype float32 or float64"
    return rewrite(node, generator)


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _filled(op: Any, spec: TensorSpec, generator: dict[str, Any], *args: Any, finish: Any = None) -> _Free:
    """The draw ``op`` into a new tensor of ``spec``'s layout."""
    layout = (op, list(spec.shape), list(spec.stride), spec.dtype, spec.device)
    return _Free(draw, (*layout, *args), generator, spec, finish)


def _multinomial(node: fx.Node, generator: dict[str, Any]) -> _Free | str:
    p, samples = node.args[0], node.args[1]
    spec, result = _tensor(p), _tensor(node)
    if samples != 1:
        return "only a single sample is rewritten"
    layout = _empty_like(spec)
    if layout is None:
        return "its probabilities are laid out in an order that is not rewritten"

    def finish(emit: _Emitter, drawn: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        rows = dense(spec, spec.shape[:-1])
        largest = emit(_aten.amax.default, (args[0], [-1]), rows)
        smallest = emit(_aten.amin.default, (args[0], [-1]), rows)
        valid = emit(_aten.gt.Scalar, (largest, 0), _boolean(rows))
        for target, item, bound in ((_aten.lt.Scalar, largest, math.inf), (_aten.ge.Scalar, smallest, 0)):
            holds = emit(target, (item, bound), _boolean(rows))
            valid = emit(_aten.bitwise_and.Tensor, (valid, holds), _boolean(rows))
        emit.check(valid, rows)
        race = emit(_aten.div.Tensor, (args[0], drawn), layout)
        return emit(_aten.argmax.default, (race, -1, True), result)

    return _filled(_aten.exponential_.default, layout, generator, finish=finish)


def _bernoulli(node: fx.Node, generator: dict[str, Any]) -> _Free | str:
    result = _tensor(node)
    if result.device.type != "cpu":
        return "it is rewritten only on the CPU"

    def finish(emit: _Emitter, drawn: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        given = _tensor(args[0])
        low = emit(_aten.ge.Scalar, (args[0], 0), _boolean(given))
        high = emit(_aten.le.Scalar, (args[0], 1), _boolean(given))
        emit.check(emit(_aten.bitwise_and.Tensor, (low, high), _boolean(given)), given)
        below = emit(_aten.lt.Tensor, (drawn, args[0]), _boolean(result))
        return emit(_aten._to_copy.default, (below,), result, {"dtype": result.dtype})

    return _filled(_aten.uniform_.default, result, generator, finish=finish)


def _normal(node: fx.Node, generator: dict[str, Any]) -> _Free | str:
    result = _tensor(node)

    def finish(emit: _Emitter, drawn: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        mean, std = args if len(args) > 1 else (args[0], 1.0)
        if _is_node(std):
            spec = _tensor(std)
            emit.check(emit(_aten.ge.Scalar, (std, 0), _boolean(spec)), spec)
        multiply = _aten.mul.Tensor if _is_node(std) else _aten.mul.Scalar
        add = _aten.add.Tensor if _is_node(mean) else _aten.add.Scalar
        return emit(add, (emit(multiply, (drawn, std), result), mean), result)

    return _filled(_aten.normal_.default, result, generator, finish=finish)


def _from(node: fx.Node, generator: dict[str, Any]) -> _Free | str:
    """Integers from ``low`` on: those from 0 on, shifted (generated code cannot spell ``random_.from``)."""
    low, high = (*node.args[1:], None)[:2]
    result = _tensor(node)
    if not isinstance(low, int) or not isinstance(high, int):
        return "its range has no upper end"

    def finish(emit: _Emitter, drawn: fx.Node, _: tuple[Any, ...]) -> fx.Node:
        return emit(_aten.add.Scalar, (drawn, low), result)

    return _filled(_aten.random_.to, result, generator, high - low, finish=finish)


def _dropout(node: fx.Node, generator: dict[str, Any]) -> _Free | str:
    x, probability, train = node.args
    spec = _tensor(x)
    if spec.device.type != "cpu":
        return "it is rewritten only on the CPU"
    if train is False or not isinstance(probability, float) or probability >= 1:
        return "a dropout that keeps all or nothing is not rewritten"
    specs = spec_of(node)
    assert isinstance(specs, tuple)
    values, mask = specs
    assert isinstance(mask, TensorSpec)

    def finish(emit: _Emitter, drawn: fx.Node, args: tuple[Any, ...]) -> tuple[fx.Node, fx.Node]:
        kept = emit(_aten.mul.Tensor, (args[0], drawn), values)
        return emit(_aten.mul.Scalar, (kept, 1 / (1 - probability)), values), drawn

    return _filled(_aten.bernoulli_.float, mask, generator, 1 - probability, finish=finish)


_REWRITES: dict[Any, Callable[[fx.Node, dict[str, Any]], _Free | str]] = {
    getattr(_aten.random, "from"): _from,
    _aten.randint_like.low_dtype: _from,
    _aten.multinomial.default: _multinomial,
    _aten.bernoulli.default: _bernoulli,
    _aten.normal.Tensor_Tensor: _normal,
    _aten.normal.Tensor_float: _normal,
    _aten.normal.float_Tensor: _normal,
    _aten.native_dropout.default: _dropout,
}


def _tensor(node: Any) -> TensorSpec:
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec), node
    return spec


def _empty_like(spec: TensorSpec) -> TensorSpec | None:
    """The layout of ``empty_like`` of a tensor, for one that is dense in some order of dimensions or in their own."""
    order = sorted(range(len(spec.shape)), key=lambda dim: -spec.stride[dim])
    packed = contiguous_strides(tuple(spec.shape[dim] for dim in order))
    if all(spec.stride[dim] == step for dim, step in zip(order, packed, strict=True)):
        return spec
    return dense(spec, spec.shape) if order == list(range(len(order))) else None
