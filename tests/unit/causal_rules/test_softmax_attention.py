"""Fused attention as recorders meet it on CUDA devices: graphs built by hand, specs from the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from fxjacobi.causal_rules.domain import Abstract, Value, constant
from fxjacobi.causal_rules.interpreter import interpret
from fxjacobi.causal_rules.registry import Context
from fxjacobi.graph import TensorSpec, is_random, spec_of, spec_of_value, stamp

aten = torch.ops.aten
FLASH, EFFICIENT, CUDNN, CPU = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def ranks(
    target: Any, rows: int, columns: int, *, causal: bool, mask: torch.Tensor | None = None, limits: float | None = None
) -> tuple[Abstract, Context]:
    """Interpret one call over ``rows`` queries and ``columns`` keys of ranks 0, 1, ..."""
    shapes = [(2, 4, length, 8) for length in (rows, columns, columns)]
    device = torch.device("meta")
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in "qkv"]
    for node, shape in zip(nodes, shapes, strict=True):
        stamp(node, spec_of_value(torch.empty(shape, device=device)))
    bias = None
    if mask is not None:
        bias = stamp(graph.placeholder("bias"), spec_of_value(mask.expand(2, 4, rows, columns)))
    args: dict[Any, tuple[Any, ...]] = {
        FLASH: (*nodes, 0.0, causal),
        EFFICIENT: (*nodes, bias, True, 0.0, causal),
        CUDNN: (*nodes, bias, True, 0.0, causal),
        CPU: (*nodes, 0.0, causal),
    }
    call = graph.call_function(target, args[target], {"attn_mask": bias} if target is CPU and mask is not None else {})
    result = target(*fx.map_arg(args[target], lambda n: torch.empty(spec_of(n).shape, device=device)))  # type: ignore[union-attr]
    stamp(call, spec_of_value(result))
    graph.output((call,))
    assert not is_random(call)
    steps = [torch.arange(shape[2], dtype=torch.int32)[:, None].expand(shape) for shape in shapes]
    values: list[Value] = [Abstract(step) for step in steps]
    if mask is not None:
        values.append(constant(mask.expand(2, 4, rows, columns), "mask"))
    context = Context(columns, assumable={} if limits is None else dict.fromkeys(nodes, limits))
    found = interpret(context, fx.GraphModule(nn.Module(), graph), values)[call]
    assert isinstance(found, tuple)
    first = found[0]
    assert isinstance(first, Abstract)
    assert not context.unknown_ops
    # Log-sum-exps and the like may depend on all of it.
    others = [one for one in found[1:] if isinstance(one, Abstract)]
    assert all(int(one.rank.min()) == first.highest for one in others if one.rank.numel())
    return first, context


@pytest.mark.parametrize("target", [FLASH, EFFICIENT, CUDNN, CPU])
def test_causal_attention_sees_the_past(target: Any) -> None:
    found, context = ranks(target, 5, 5, causal=True)
    assert found.rank[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert len(context.kills) == 1
    assert ranks(target, 5, 5, causal=False)[0].rank.unique().tolist() == [4]


@pytest.mark.parametrize("target", [FLASH, EFFICIENT, CUDNN, CPU])
@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (5, 3)])
def test_a_triangle_of_unequal_sides_may_be_aligned_either_way(target: Any, rows: int, columns: int) -> None:
    # CPU kernels let query i see keys up to i, some CUDA kernels keys up to i + columns - rows.
    found = ranks(target, rows, columns, causal=True)[0].rank[0, 0, :, 0].tolist()
    later = max(0, columns - rows) if target is not CPU else 0
    assert found == [max(i, min(i + later, columns - 1)) for i in range(rows)]


@pytest.mark.parametrize("target", [EFFICIENT, CUDNN, CPU])
@pytest.mark.parametrize("low", [-torch.inf, -1e9, torch.finfo(torch.float32).min, -20.0])
def test_masks(target: Any, low: float) -> None:
    mask = torch.full((5, 5), low).triu(1)
    found, context = ranks(target, 5, 5, causal=False, mask=mask, limits=100.0)
    holds = low < -1e4
    assert found.rank[0, 0, :, 0].tolist() == ([0, 1, 2, 3, 4] if holds else [4] * 5)
    assert context.reads == ({"mask"} if holds else set())
    assert len(context.limits) == (2 if holds and low > -torch.inf else 0)
    mask[1, 3] = 0
    leaking = ranks(target, 5, 5, causal=False, mask=mask, limits=100.0)[0]
    assert leaking.rank[0, 0, :, 0].tolist() == ([0, 3, 2, 3, 4] if holds else [4] * 5)


def test_dropout_is_random() -> None:
    graph = fx.Graph()
    nodes = [
        stamp(graph.placeholder(n), TensorSpec((1, 1, 2, 2), torch.float32, torch.device("meta"), (4, 4, 2, 1)))
        for n in "qkv"
    ]
    assert is_random(graph.call_function(FLASH, (*nodes, 0.5, True)))
