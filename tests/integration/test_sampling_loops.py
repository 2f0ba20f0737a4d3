"""Whole sampling loops through ``compile``: found, proven, collapsed, and equal from the same seed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

import fxjacobi
from fxjacobi.loops import Kind
from fxjacobi.verify import equal

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 24


class Masked(nn.Linear):
    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.mask = nn.Buffer(mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


def made(leak: bool = False) -> nn.Module:
    degrees, positions = 1 + torch.arange(32) % (STEPS - 1), torch.arange(1, STEPS + 1)
    last = (positions.repeat(2)[:, None] > degrees).float()
    if leak:
        last[3] = 1
    first = (degrees[:, None] >= positions).float()
    return nn.Sequential(Masked(first), nn.ReLU(), Masked(last))


class Transformer(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(5, 16), nn.Parameter(torch.randn(STEPS, 16) * 0.1)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(layers))
        self.projections = nn.ModuleList(nn.Linear(16, 48) for _ in range(layers))
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(F.pad(tokens[:, :-1], (1, 0))) + self.place
        for norm, qkv in zip(self.norms, self.projections, strict=True):
            q, k, v = qkv(norm(h)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        logits: torch.Tensor = self.head(h)
        return logits


@torch.no_grad()
def sample_reals(model: nn.Module, n: int) -> torch.Tensor:
    x = torch.zeros(n, STEPS)
    for t in range(STEPS):
        mean, logscale = model(x).chunk(2, -1)
        x[:, t] = mean[:, t] + logscale[:, t].exp() * torch.rand(n).logit()
    return x


@torch.no_grad()
def sample_tokens(model: nn.Module, n: int) -> torch.Tensor:
    x = torch.zeros(n, STEPS, dtype=torch.long)
    for t in range(STEPS):
        x[:, t] = torch.multinomial(model(x)[:, t].softmax(-1), 1).squeeze(-1)
    return x


def _same_samples(sample: Callable[..., torch.Tensor], *args: Any, **options: Any) -> fxjacobi.SolvedModule:
    compiled = fxjacobi.compile(sample, measure=False, **options)
    for seed in range(4):
        torch.manual_seed(seed)
        found = compiled(*args)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert equal(found, sample(*args))
        assert torch.equal(state, torch.get_rng_state())
    return compiled


def _kinds(compiled: fxjacobi.SolvedModule) -> set[Kind | None]:
    return {block.kind for block in compiled.plan.blocks}


def test_a_made_is_collapsed() -> None:
    compiled = _same_samples(sample_reals, made(), 5)
    assert Kind.WRITES in _kinds(compiled)
    (block,) = [b for b in compiled.report.blocks if b.method == "jacobi"]
    assert block.sweeps < STEPS
    assert block.prefixes[-1] == STEPS


def test_a_leaking_mask_is_refused_and_named() -> None:
    compiled = _same_samples(sample_reals, made(leak=True), 5)
    assert Kind.WRITES not in _kinds(compiled)
    assert any("not collapsed" in b.reason and "step" in b.reason for b in compiled.plan.blocks)


def test_a_changed_mask_is_proven_again() -> None:
    model = made()
    compiled = _same_samples(sample_reals, model, 5)
    with torch.no_grad():
        model[2].mask[3] = 1  # type: ignore[index] # now it leaks
    for seed in range(2):
        torch.manual_seed(seed)
        found = compiled(model, 5)
        torch.manual_seed(seed)
        assert equal(found, sample_reals(model, 5))


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_a_transformer_is_collapsed_with_its_layers_rolled_or_not(layers: int) -> None:
    compiled = _same_samples(sample_tokens, Transformer(layers), 3)
    assert Kind.WRITES in _kinds(compiled)
    assert max(b.sweeps for b in compiled.report.blocks if b.method == "jacobi") < STEPS


@pytest.mark.parametrize(("options", "method"), [
    ({"method": "windowed"}, "jacobi (window of 6)"), ({"method": "jacobi"}, "jacobi"),
    ({"memory_limit": 500}, "jacobi (window of 5)"), ({"method": "windowed", "memory_limit": 1}, "jacobi (window of 1)"),
])  # fmt: skip
def test_a_window_is_asked_for_or_follows_from_memory(options: dict[str, Any], method: str) -> None:
    compiled = _same_samples(sample_reals, made(), 5, **options)
    (block,) = [b for b in compiled.plan.blocks if b.kind is Kind.WRITES]
    assert block.method == method
    (report,) = [b for b in compiled.report.blocks if b.method == method]
    assert report.prefixes[-1] == STEPS


def test_the_ordinary_order_may_be_asked_for() -> None:
    compiled = _same_samples(sample_reals, made(), 5, method="sequential")
    assert Kind.WRITES not in _kinds(compiled)
    assert any("was asked for" in b.reason for b in compiled.plan.blocks)


@torch.no_grad()
def sample_inpainted(model: nn.Module, image: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    x = torch.where(known, image, torch.zeros(()))
    for t in range(STEPS):
        mean, logscale = model(x).chunk(2, -1)
        drawn = mean[:, t] + logscale[:, t].exp() * torch.rand(len(x)).logit()
        x[:, t] = torch.where(known[:, t], image[:, t], drawn)
    return x


def test_samples_that_are_final_are_left_out() -> None:
    known = torch.rand(32, STEPS) < 0.95
    known[::8] = False  # a few images are not known at all
    compiled = _same_samples(sample_inpainted, made(), torch.randn(32, STEPS), known)
    (block,) = [b for b in compiled.report.blocks if b.active]
    assert block.active[0] == block.active[-1] == 32
    assert min(block.active) <= 8
    assert len(block.active) == block.sweeps == len(block.prefixes)


def test_the_plan_says_what_became_of_leaving_samples_out() -> None:
    compiled = _same_samples(sample_reals, made(), 32)
    (row,) = [b for b in compiled.plan.blocks if b.kind is Kind.WRITES]
    assert "are left out once 16 are not" in row.reason
    block: Any = compiled._last.module.get_submodule(row.name)  # type: ignore[union-attr]
    block.refuse_fewer("planted")
    assert "planted" in str(compiled.plan)
    assert [b.name for b in compiled.plan.blocks if "planted" in b.reason] == [row.name]


@torch.no_grad()
def fill(model: nn.Module, x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    for t in range(STEPS):
        mean, logscale = model(x).chunk(2, -1)
        x[:, t] = mean[:, t] + logscale[:, t].exp() * noise[t]
    return x


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("late", [0, 1, 2, 3])
@pytest.mark.parametrize("samples", [2, 3])
def test_an_array_is_filled_where_it_lies(late: int, samples: int, transposed: bool) -> None:
    # Products round by where their operands start, modulo 16 bytes, and by their strides.
    def array() -> torch.Tensor:
        memory = torch.zeros(late + samples * STEPS)[late:]
        return memory.view(STEPS, samples).t() if transposed else memory.view(samples, STEPS)

    model, noise = made(), torch.randn(STEPS, samples)
    compiled = fxjacobi.compile(fill, measure=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (1.0, 0.5):
            assert equal(compiled(model, array(), noise * scale), fill(model, array(), noise * scale))
    assert Kind.WRITES in _kinds(compiled)
    assert compiled.report.solved
    assert max(b.sweeps for b in compiled.report.blocks) < STEPS


@torch.no_grad()
def sample_until_end(model: nn.Module, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n = noise.shape[1]
    x = torch.zeros(n, STEPS, dtype=torch.long)
    ended, last = torch.zeros(n, dtype=torch.bool), torch.ones(n, dtype=torch.long)
    for t in range(STEPS):
        scores = 30 * model(x)[:, t] + noise[t] + F.one_hot(last, 5)
        last = torch.where(ended, torch.zeros_like(last), scores.argmax(-1))
        ended = ended | (last == 0)
        x[:, t] = last
    return x, ended


@pytest.mark.parametrize("method", ["auto", "windowed"])
def test_what_a_step_hands_on_belongs_to_a_sample_too(method: str) -> None:
    noise = torch.randn(STEPS, 24, 5, generator=torch.Generator().manual_seed(0)) * 2
    noise[0, 4:, 0] = 500.0  # most sequences end at once
    model = Transformer(2)
    compiled = fxjacobi.compile(sample_until_end, measure=False, method=method)
    for scale in (1.0, 0.5, 2.0):
        for a, b in zip(compiled(model, noise * scale), sample_until_end(model, noise * scale), strict=True):
            assert equal(a, b)
    (block,) = [b for b in compiled.report.blocks if b.active]
    assert block.sweeps <= STEPS + 1 or method == "windowed"
    assert method == "windowed" or min(block.active) < 24
