"""Ways to evaluate T matrix products: as rows of one larger product, or as slices of a batched one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.loops import align_rows
from fxjacobi.operation import Env, Operation, Role, Way, expanded, record, small_graph, with_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import fx

__all__ = ["products"]

aten = torch.ops.aten


def products(operation: Operation) -> Iterator[tuple[Way, fx.GraphModule]]:
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

    def rows(env: Env) -> Any:
        """(T, m, k) x (k, n) as (T m, k) x (k, n)."""
        m, k = operation.shape(left)
        folded = aten.reshape.default(env[left], [steps * m, k])
        if bias is None:
            product = aten.mm.default(folded, env[right])
        else:
            added = env[bias]
            if operation.roles[bias] is Role.BATCHED or len(operation.shape(bias)) == 2:
                wide = with_rank(operation, bias, env, 2)
                added = aten.reshape.default(aten.expand.default(wide, [steps, *shape]), [steps * m, shape[-1]])
            product = aten.addmm.default(added, folded, env[right], **kwargs)
        return aten.reshape.default(product, [steps, *shape])

    def vectors(env: Env) -> Any:
        """(m, k) x (T, k) as (T, k) x (k, m)."""
        turned = aten.t.default(env[left])
        if bias is None:
            return aten.mm.default(env[right], turned)
        return aten.addmm.default(env[bias], env[right], turned, **kwargs)

    def slices(env: Env, align: Callable[[fx.Node, Any], Any] = lambda _node, value: value) -> Any:
        a, b = (align(n, expanded(operation, n, env)) for n in (left, right))
        if vector:
            b = aten.unsqueeze.default(b, 2)
        if bias is None:
            product = aten.bmm.default(a, b)
        else:
            full = aten.expand.default(with_rank(operation, bias, env, len(shape)), [steps, *shape])
            added = aten.unsqueeze.default(full, 2) if vector else full
            product = aten.baddbmm.default(added, a, b, **kwargs)
        return aten.squeeze.dim(product, 2) if vector else product

    if operation.roles[right] is Role.UNIFORM and not vector:
        yield Way.FLATTENED, small_graph(operation, rows)
    if operation.roles[left] is Role.UNIFORM and vector:
        yield Way.FLATTENED, small_graph(operation, vectors)
    yield Way.BATCHED_MATMUL, small_graph(operation, slices)

    def aligned(node: fx.Node, value: Any) -> Any:
        return record(align_rows, value) if operation.roles[node] is Role.BATCHED else value

    yield Way.ALIGNED_MATMUL, small_graph(operation, lambda env: slices(env, aligned))
