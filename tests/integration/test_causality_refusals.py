"""Planted failures, from end to end: a loop that is not causal is left alone, named, and gives the right sample.

Finite masks, from end to end: proven where the weights bound the scores, whatever form they come in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import fxjacobi
from fxjacobi.certificate import Certificate
from fxjacobi.loops import Kind
from fxjacobi.verify import equal
from tests.unit.sampling_models import Attention, made, pixel_cnn

if TYPE_CHECKING:
    from collections.abc import Callable

SIDE = 5
LOWEST = torch.finfo(torch.float32).min


@torch.no_grad()
def sample_reals(net: nn.Module, ahead: int = 0, size: int = 12) -> torch.Tensor:
    x = torch.zeros(3, size)
    for t in range(size - ahead):
        mean, scale = net(x).chunk(2, -1)
        x[:, t] = mean[:, t + ahead] + scale[:, t + ahead].exp() * torch.randn(3)
    return x


@torch.no_grad()
def sample_pixels(net: nn.Module) -> torch.Tensor:
    x = torch.zeros(3, 1, SIDE, SIDE)
    for i in range(SIDE):
        for j in range(SIDE):
            out = net(x)[:, :, i, j]
            x[:, 0, i, j] = out[:, 0] + out[:, 1].tanh() * torch.randn(3)
    return x


@torch.no_grad()
def sample_tokens(net: nn.Module, length: int = 12) -> torch.Tensor:
    x = torch.zeros(2, length, dtype=torch.long)
    for t in range(length):
        x[:, t] = torch.multinomial(net(x)[:, t].softmax(-1), 1).squeeze(-1)
    return x


def same_samples(sample: Callable[..., torch.Tensor], *args: Any) -> fxjacobi.SolvedModule:
    compiled = fxjacobi.compile(sample, measure=False)
    for seed in range(3):
        torch.manual_seed(seed)
        found = compiled(*args)
        torch.manual_seed(seed)
        assert equal(found, sample(*args))
    return compiled


def refusal(compiled: fxjacobi.SolvedModule) -> str:
    assert Kind.WRITES not in {block.kind for block in compiled.plan.blocks}
    reasons = [block.reason for block in compiled.plan.blocks if "not collapsed" in block.reason]
    assert reasons
    return "; ".join(reasons)


def leaking_made() -> nn.Module:
    net = made(12, 24)
    net[2].mask[2, 5] = 1  # type: ignore[operator]
    return net


PLANTED: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], tuple[Any, ...]], str, str]] = {
    "one leaking mask entry": (sample_reals, lambda: (leaking_made(),), "element [0, 3]", "aten.addmm"),
    "a kernel centre left on": (
        sample_pixels,
        lambda: (pixel_cnn(first="centre"),),
        "element [0, 0, 0, ",
        "aten.convolution",
    ),
    "a kernel that looks ahead": (
        sample_pixels,
        lambda: (pixel_cnn(third="ahead"),),
        "element [0, 0, 0, ",
        "aten.convolution",
    ),
    "a mask off by one, added": (
        sample_tokens,
        lambda: (Attention("plain", diagonal=2),),
        "element [0, 0]",
        "aten.bmm",
    ),
    "a mask off by one, fused": (
        sample_tokens,
        lambda: (Attention("mask", diagonal=2),),
        "element [0, 0]",
        "attention",
    ),
    "a batch norm that trains": (
        sample_pixels,
        lambda: (pixel_cnn(norm=nn.BatchNorm2d(8, track_running_stats=False)),),
        "element [0, 0, 0, ",
        "batch_norm",
    ),
    "a look-ahead of one": (sample_reals, lambda: (made(12, 24), 1), "element [0, 0]", "depends on itself"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_is_not_causal_is_named_and_left_alone(planted: str) -> None:
    sample, arguments, element, culprit = PLANTED[planted]
    reason = refusal(same_samples(sample, *arguments()))
    assert element in reason
    assert culprit in reason
    assert "aten." in reason


def test_the_same_loops_without_the_plant_are_collapsed() -> None:
    for sample, net in (
        (sample_reals, made(12, 24)),
        (sample_pixels, pixel_cnn()),
        (sample_tokens, Attention("plain")),
    ):
        compiled = same_samples(sample, net)
        assert Kind.WRITES in {block.kind for block in compiled.plan.blocks}


class Finite(nn.Module):
    """Two layers of attention over shifted tokens, in one of the forms in which people write masks."""

    mask: torch.Tensor

    def __init__(self, how: str, low: float, length: int = 12, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.low = how, low
        self.embedding, self.position = nn.Embedding(5, width), nn.Parameter(torch.randn(length, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.project = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.attention = nn.ModuleList(nn.MultiheadAttention(width, 2, batch_first=True) for _ in range(2))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, dropout=0.0) for _ in range(2)
        )
        self.head = nn.Linear(width, 5)
        self.register_buffer("mask", torch.ones(length, length).tril())
        self.eval()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        state = self.embedding(functional.pad(tokens[:, :-1], (1, 0))) + self.position
        above = torch.where(self.mask > 0, 0.0, self.low)
        for norm, project, attention, layer in zip(self.norms, self.project, self.attention, self.layers, strict=True):
            y = norm(state)
            if self.how == "encoder layer":
                state = layer(state, src_mask=above)
            elif self.how == "multi-head attention":
                state = state + attention(y, y, y, attn_mask=above, need_weights=False)[0]
            else:
                query, key, value = project(y).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
                if self.how == "fused":
                    seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=above)
                else:
                    scores = query @ key.transpose(-1, -2) / 8**0.5
                    masked = scores.masked_fill(self.mask == 0, self.low) if self.how == "filled" else scores + above
                    seen = masked.softmax(-1) @ value
                state = state + seen.transpose(1, 2).flatten(2)
        logits: torch.Tensor = self.head(state)
        return logits


@pytest.mark.parametrize("low", [-1e9, -1e4, LOWEST])
@pytest.mark.parametrize("how", ["filled", "added", "fused", "multi-head attention", "encoder layer"])
def test_finite_masks_collapse(how: str, low: float) -> None:
    compiled = same_samples(sample_tokens, Finite(how, low))
    (block,) = [block for block in compiled.report.blocks if block.method.startswith("jacobi")]
    assert block.sweeps < 12


def test_a_finite_mask_that_scores_outweigh_is_refused() -> None:
    net = Finite("added", -1e4)
    with torch.no_grad():
        for project in net.project:
            project.weight.mul_(100)  # type: ignore[operator]
    reason = refusal(same_samples(sample_tokens, net))
    assert "a finite mask is given, but it does not outweigh scores that may differ by" in reason


def test_a_finite_mask_is_proven_again_when_the_weights_have_changed() -> None:
    net = Finite("added", -1e4)
    compiled = same_samples(sample_tokens, net)
    with torch.no_grad():
        for project in net.project:
            project.weight.mul_(300)  # type: ignore[operator]
    for seed in range(2):
        torch.manual_seed(seed)
        found = compiled(net)
        torch.manual_seed(seed)
        assert equal(found, sample_tokens(net))
    (block,) = [block for block in compiled.report.blocks if block.method.startswith("jacobi")]
    assert block.certificate is Certificate.SEQUENTIAL
