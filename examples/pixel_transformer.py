"""A causal transformer over digit pixels of 16 grey levels, sampled with and without a cache of keys and values.

Pixels are tokens in raster order, T = size * size. Token t is predicted from tokens before t: the input is shifted by one
position behind a learned start vector, and attention is causal.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from digits import strokes, tokens
from torch import Tensor, nn
from torch.distributions import Categorical
from training import fit
from weights import pretrained

if TYPE_CHECKING:
    from collections.abc import Callable


class CausalAttention(nn.Module):
    """Multi-head attention in which position t sees positions up to t: (B, T, width) -> (B, T, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, heads, T, width / heads)."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the whole sequence."""
        query, key, value = self.project(x)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        joined: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return joined

    def step(self, x: Tensor, keys: Tensor, values: Tensor, t: int) -> Tensor:
        """Attend from position t alone, x (B, 1, width); writes position t of the caches (B, heads, T, width / heads)."""
        query, keys[:, :, t : t + 1], values[:, :, t : t + 1] = self.project(x)
        y = F.scaled_dot_product_attention(query, keys[:, :, : t + 1], values[:, :, : t + 1])
        joined: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return joined


class Layer(nn.Module):
    """Attention and a perceptron, each behind a layer norm and inside a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.before_perceptron = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        x = x + self.attention(self.before_attention(x))
        y: Tensor = x + self.perceptron(self.before_perceptron(x))
        return y

    def step(self, x: Tensor, keys: Tensor, values: Tensor, t: int) -> Tensor:
        """Position t alone: (B, 1, width) -> (B, 1, width)."""
        x = x + self.attention.step(self.before_attention(x), keys, values, t)
        y: Tensor = x + self.perceptron(self.before_perceptron(x))
        return y


class PixelTransformer(nn.Module):
    """Tokens (B, T) -> logits (B, T, levels); the ones at t depend on tokens before t only."""

    def __init__(self, length: int = 784, levels: int = 16, width: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.length, self.levels, self.width, self.heads = length, levels, width, heads
        self.embedding = nn.Embedding(levels, width)
        self.start = nn.Parameter(0.02 * torch.randn(width))
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, levels)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of every position; a prefix, (B, t) with t <= T, gives the first t positions' logits."""
        start = self.start.expand(x.shape[0], 1, -1)
        y = torch.cat([start, self.embedding(x[:, :-1])], dim=1) + self.position[: x.shape[1]]
        for layer in self.layers:
            y = layer(y)
        logits: Tensor = self.head(self.norm(y))
        return logits

    def step(self, previous: Tensor | None, caches: list[tuple[Tensor, Tensor]], t: int) -> Tensor:
        """Logits (B, levels) of position t from the token before it, (B,) or None at t = 0, and the layers' caches."""
        batch = caches[0][0].shape[0]
        token = self.start.expand(batch, -1) if previous is None else self.embedding(previous)
        y = (token + self.position[t]).unsqueeze(1)
        for layer, (keys, values) in zip(self.layers, caches, strict=True):
            assert isinstance(layer, Layer)
            y = layer.step(y, keys, values, t)
        logits: Tensor = self.head(self.norm(y)).squeeze(1)
        return logits

    def caches(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Room for every layer's keys and values, each (B, heads, T, width / heads)."""
        shape = (batch, self.heads, self.length, self.width // self.heads)
        return [(self.position.new_zeros(shape), self.position.new_zeros(shape)) for _ in self.layers]


@torch.no_grad()
def sample(model: PixelTransformer, n: int) -> Tensor:
    """Draw (n, T) without a cache: one run over the whole sequence a token, drawn by `torch.multinomial`."""
    x = torch.zeros(n, model.length, dtype=torch.long)
    for t in range(model.length):
        probabilities = model(x)[:, t].softmax(-1)
        x[:, t] = torch.multinomial(probabilities, 1).squeeze(-1)
    return x


@torch.no_grad()
def sample_categorical(model: PixelTransformer, n: int) -> Tensor:
    """As `sample`, each token drawn by `torch.distributions.Categorical`."""
    x = torch.zeros(n, model.length, dtype=torch.long)
    for t in range(model.length):
        x[:, t] = Categorical(logits=model(x)[:, t]).sample()
    return x


@torch.no_grad()
def sample_prefix(model: PixelTransformer, n: int) -> Tensor:
    """As `sample`, each run over the known tokens only: half the arithmetic, a new shape every step."""
    x = torch.zeros(n, model.length, dtype=torch.long)
    for t in range(model.length):
        probabilities = model(x[:, : t + 1])[:, t].softmax(-1)
        x[:, t] = torch.multinomial(probabilities, 1).squeeze(-1)
    return x


@torch.no_grad()
def sample_cached(model: PixelTransformer, n: int) -> Tensor:
    """As `sample`, with a cache of keys and values by hand: one position a token; probabilities equal up to rounding."""
    x = torch.zeros(n, model.length, dtype=torch.long)
    caches = model.caches(n)
    for t in range(model.length):
        probabilities = model.step(x[:, t - 1] if t > 0 else None, caches, t).softmax(-1)
        x[:, t] = torch.multinomial(probabilities, 1).squeeze(-1)
    return x


def cross_entropy(model: PixelTransformer, x: Tensor) -> Tensor:
    """Mean nats per token of (B, T)."""
    return F.cross_entropy(model(x).flatten(0, 1), x.flatten())


def train(model: PixelTransformer, steps: int = 700, batch: int = 8, seed: int = 0) -> list[float]:
    """Train on the digits' strokes as tokens; the losses."""
    side = int(model.length**0.5)
    data = tokens(strokes(side), model.levels).flatten(1).to(model.position.device)
    return fit(model, lambda x: cross_entropy(model, x), data, steps=steps, batch=batch, rate=3e-3, seed=seed)


def untrained() -> PixelTransformer:
    """The network for 28x28 digits as it is before training, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PixelTransformer()


def digits_model() -> PixelTransformer:
    """The network trained on the digits at 28x28."""
    return pretrained("pixel_transformer", untrained(), train)


def main() -> None:
    """Draw digits ordinarily, compiled, over prefixes and with the cache by hand; print the times."""
    from compare import compare, timed

    samplers: dict[str, Callable[[PixelTransformer, int], Tensor]] = {
        "multinomial": sample,
        "categorical": sample_categorical,
    }
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--draw", choices=samplers, default="multinomial")
    arguments = parser.parse_args()
    model = digits_model()
    compare(
        f"transformer, T = {model.length}, batch {arguments.batch}", samplers[arguments.draw], model, arguments.batch
    )
    for name, sampler in (("growing prefix", sample_prefix), ("hand-written cache of keys and values", sample_cached)):
        seconds, _ = timed(sampler, model, arguments.batch)
        print(f"{name}: {seconds:.3f} s")


if __name__ == "__main__":
    main()
