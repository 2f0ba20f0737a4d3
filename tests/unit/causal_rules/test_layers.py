"""Ranks through recorded layers and networks, rule by rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from fxjacobi.causal_rules.domain import Abstract, Value, constant, squash, unknown
from fxjacobi.causal_rules.interpreter import interpret, operand_value
from fxjacobi.causal_rules.matmul import masked_maximum
from fxjacobi.causal_rules.registry import Context
from fxjacobi.graph import stamp_all
from tests.unit.sampling_models import Attention, Encoder, Shifted, pixel_cnn


def ranks(function: Any, rank: torch.Tensor, example: torch.Tensor, *constants: torch.Tensor) -> Abstract:
    """Interpret a recorded function on ranks."""
    with torch.no_grad():
        module = make_fx(lambda *args: function(*args))(example, *constants)  # noqa: PLW0108 - it counts arguments

        stamp_all(module, [example, *constants])
    context = Context(int(rank.max()))
    values: list[Value] = [Abstract(rank), *(constant(c, f"c{i}") for i, c in enumerate(constants))]
    env = interpret(context, module, values)
    result = env[module.graph.output_node().args[0]]  # type: ignore[index]
    assert isinstance(result, Abstract)
    assert not context.unknown_ops
    return result


def time_ranks(batch: int, length: int, width: int) -> torch.Tensor:
    return torch.arange(length, dtype=torch.int32)[None, :, None].expand(batch, length, width)


def test_encoder_layers_keep_causality() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    x = torch.randn(2, 5, 8)
    found = ranks(lambda x, m: layer(x, src_mask=m), time_ranks(2, 5, 8), x, mask)
    assert torch.equal(found.rank, time_ranks(2, 5, 8))
    open_mask = mask.clone()
    open_mask[1, 3] = 0
    found = ranks(lambda x, m: layer(x, src_mask=m), time_ranks(2, 5, 8), x, open_mask)
    assert found.rank[0, :, 0].tolist() == [0, 3, 2, 3, 4]


@pytest.mark.parametrize("low", [float("-inf"), -1e9, -1e4, -1.0])
@pytest.mark.parametrize("kind", ["layer", "attention"])
def test_fused_encoder_layers_take_any_mask_for_a_bool(low: float, kind: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    attention = layer.self_attn
    weights = (attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight, attention.out_proj.bias)
    norms = (layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias)
    dense = (layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias)

    def run(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if kind == "layer":
            out: torch.Tensor = torch._transformer_encoder_layer_fwd(
                x, 8, 2, *weights, False, False, 1e-5, *norms, *dense, mask, 0
            )
        else:
            out = torch._native_multi_head_attention(x, x, x, 8, 2, *weights, mask, False, True, 0)[0]
        return out

    mask, x = torch.full((5, 5), low).triu(1), torch.randn(2, 5, 8)
    with torch.no_grad():
        assert torch.equal(run(x, mask), run(x, mask != 0))
    assert torch.equal(ranks(run, time_ranks(2, 5, 8), x, mask).rank, time_ranks(2, 5, 8))
    mask[1, 3] = 0
    assert ranks(run, time_ranks(2, 5, 8), x, mask).rank[0, :, 0].tolist() == [0, 3, 2, 3, 4]


def test_multi_head_attention_with_weights_and_without() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    x = torch.randn(2, 5, 8)
    fused = ranks(lambda x, m: attention(x, x, x, attn_mask=m, need_weights=False)[0], time_ranks(2, 5, 8), x, mask)
    plain = ranks(lambda x, m: attention(x, x, x, attn_mask=m)[0], time_ranks(2, 5, 8), x, mask)
    assert torch.equal(fused.rank, time_ranks(2, 5, 8))
    assert torch.equal(plain.rank, time_ranks(2, 5, 8))


def test_recurrent_layers_see_the_past() -> None:
    lstm = nn.LSTM(3, 4, batch_first=True).eval()
    found = ranks(lambda x: lstm(x)[0], time_ranks(2, 5, 3), torch.randn(2, 5, 3))
    assert torch.equal(found.rank, time_ranks(2, 5, 4))


def test_weight_norm_of_a_masked_kernel_keeps_its_zeros() -> None:
    kernel = torch.randn(2, 2, 3)
    kernel[:, :, 1:] = 0

    def run(x: torch.Tensor, v: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        return functional.conv1d(x, torch._weight_norm(v, g, 0), padding=1)

    rank = torch.arange(6, dtype=torch.int32).expand(1, 2, 6)
    found = ranks(run, rank, torch.randn(1, 2, 6), kernel, torch.ones(2, 1, 1))
    assert found.rank[0, 0].tolist() == [-1, 0, 1, 2, 3, 4]


def test_grouped_queries_and_log_softmax() -> None:
    rank = time_ranks(4, 5, 2)[None]

    def run(x: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(x, x[:, :2], x[:, :2], is_causal=True, enable_gqa=True)

    assert torch.equal(ranks(run, rank, torch.randn(1, 4, 5, 2)).rank, rank)
    masked = ranks(
        lambda x, m: x.masked_fill(m, -torch.inf).log_softmax(-1),
        torch.arange(3, dtype=torch.int32).expand(2, 3), torch.randn(2, 3), torch.tensor([False, False, True]),
    )  # fmt: skip
    assert masked.rank.tolist() == [[1, 1, -1]] * 2
    assert masked.known is not None
    assert masked.known.tolist() == [[False, False, True]] * 2


def test_ranks_stay_small_along_dimensions_where_they_are_constant() -> None:
    replay = pixel_cnn()
    rank = torch.arange(16, dtype=torch.int32).reshape(1, 1, 4, 4).expand(64, 1, 4, 4)
    found = ranks(replay, rank, torch.randn(64, 1, 4, 4))
    assert found.rank.stride(0) == 0
    assert squash(found.rank).numel() <= 2 * 16


def test_masked_maximum_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    for batch in ((), (3,)):
        for rows, inner, columns in ((1, 7, 5), (4, 7, 5), (6, 1, 2)):
            rank = torch.randint(-1, 9, (*batch, rows, inner), generator=generator, dtype=torch.int32)
            alive = torch.rand(*batch, inner, columns, generator=generator) > 0.5
            wanted = torch.where(alive.unsqueeze(-3), rank.unsqueeze(-1), -1).amax(-2)
            assert torch.equal(masked_maximum(rank, alive).expand(wanted.shape), wanted)
            every = rank.amax(-1, keepdim=True)
            assert torch.equal(masked_maximum(rank, None), every)


def test_equal_columns_of_a_large_mask_are_computed_once() -> None:
    rank = torch.randint(-1, 50, (300, 200), dtype=torch.int32)
    alive = torch.ones(200, 3, dtype=torch.bool).tril(-1).repeat(1, 50)
    wanted = torch.where(alive[None], rank[:, :, None], -1).amax(1)
    assert torch.equal(masked_maximum(rank, alive).expand(wanted.shape), wanted)


def test_operand_values_are_known_only_by_name() -> None:
    tensor = torch.ones(2)
    known, blank = operand_value(tensor, "mask"), operand_value(tensor, None)
    assert isinstance(known, Abstract)
    assert isinstance(blank, Abstract)
    assert known.constant
    assert known.sources == {"mask"}
    assert blank.known is None
    assert not unknown((2,)).constant


@pytest.mark.parametrize("net", [Shifted(), pixel_cnn()], ids=["shifted", "masked"])
def test_image_networks(net: nn.Module) -> None:
    rank = torch.arange(25, dtype=torch.int32).reshape(1, 1, 5, 5)
    found = ranks(net.forward, rank, torch.randn(1, 1, 5, 5))
    assert bool((found.rank[0, 0] < rank[0, 0]).all())
    assert int(found.rank.max()) == 23


@pytest.mark.parametrize("kind", ["causal", "mask", "plain"])
def test_token_networks(kind: str) -> None:
    net = Attention(kind).eval()
    rank = torch.arange(12, dtype=torch.int32).expand(2, 12)
    found = ranks(net.forward, rank, torch.zeros(2, 12, dtype=torch.long))
    assert torch.equal(found.rank, (rank - 1)[..., None].expand(2, 12, 6))


def test_the_fused_encoder() -> None:
    net = Encoder().eval()
    rank = torch.arange(12, dtype=torch.int32).expand(2, 12)
    found = ranks(net.forward, rank, torch.zeros(2, 12, dtype=torch.long))
    assert torch.equal(found.rank, (rank - 1)[..., None].expand(2, 12, 6))
