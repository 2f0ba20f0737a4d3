"""Ranks through reshapes: the same elements, and no batch carried along."""

from __future__ import annotations

import random

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fxjacobi.causal_rules.domain import Abstract, constant, squash
from fxjacobi.causal_rules.interpreter import interpret
from fxjacobi.causal_rules.registry import Context
from fxjacobi.causal_rules.views import reshaped
from fxjacobi.graph import stamp_all
from tests.unit.sampling_models import Attention


def factors(total: int, draw: random.Random) -> tuple[int, ...]:
    found: list[int] = []
    while total > 1:
        found.append(draw.choice([n for n in range(2, total + 1) if total % n == 0]))
        total //= found[-1]
    for _ in range(draw.randint(0, 2)):
        found.insert(draw.randint(0, len(found)), 1)
    return tuple(found)


@pytest.mark.parametrize("seed", range(40))
def test_reshaping_squashed_tensors_is_reshaping(seed: int) -> None:
    draw = random.Random(seed)
    for total in (1, 6, 7, 12, 24, 36, 60):
        old, new = factors(total, draw), factors(total, draw)
        tensor = torch.randn([size if draw.random() < 0.6 else 1 for size in old]).expand(old)
        assert torch.equal(reshaped(tensor, new), tensor.reshape(new))


def test_merged_dimensions_of_stride_zero_stay_so() -> None:
    rank = torch.arange(5).view(1, 1, 5, 1).expand(4, 3, 5, 2)
    assert reshaped(rank, (12, 5, 2)).stride() == (0, 1, 0)
    assert reshaped(reshaped(rank, (12, 5, 2)), (4, 3, 5, 2)).stride() == (0, 0, 1, 0)


def test_attention_written_out_carries_neither_batch_nor_heads() -> None:
    """``(B * L, W)`` merges the batch with the positions, ``(B * H, L, d)`` with the heads; both come apart again."""
    net = Attention("plain").eval()
    tokens = torch.zeros(6, 12, dtype=torch.long)
    named = dict(net.named_parameters()) | dict(net.named_buffers())

    def run(x: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.functional_call(net, dict(zip(named, tensors, strict=True)), (x,))
        return result

    tensors = [tensor.detach() for tensor in named.values()]
    with torch.no_grad():
        module = make_fx(run)(tokens, *tensors)
        stamp_all(module, [tokens, *tensors])
    rank = torch.arange(12, dtype=torch.int32).expand(6, 12)
    env = interpret(Context(11), module, [Abstract(rank), *(constant(one, "c") for one in tensors)])
    sizes = [squash(value.rank).numel() for value in env.values() if isinstance(value, Abstract)]
    # Attention weights have a rank for each pair of positions; where the batch is merged, each position has six.
    assert max(sizes) <= 12 * 12
