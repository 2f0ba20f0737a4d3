"""What compiling costs a call where nothing can be gained: ten small models, compiled beside original."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

import fxjacobi
from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.testing.assertions import assert_equal_bits
from fxjacobi.timing import interleaved

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Overhead", "models"]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``relu(x + f(x))``."""
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Attention(nn.Module):
    """Causal self-attention as most repositories write it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the attended values, ``(B, T, C)``."""
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.as_tensor(self.out(y.transpose(1, 2).reshape(b, t, c)))


class Classifier(nn.Module):
    """A bag of embedded tokens and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.EmbeddingBag(1000, 64, mode="mean")
        self.head = nn.Linear(64, 10)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        return torch.as_tensor(self.head(self.embed(tokens)))


class Mixer(nn.Module):
    """One block of an MLP-mixer."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.along = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix tokens, then channels."""
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return torch.as_tensor(x + self.along(self.norm2(x)))


class Recurrent(nn.Module):
    """A dense float recurrence, which exact solving cannot speed up."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell = nn.RNNCell(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last state."""
        h = torch.zeros_like(x[0])
        for item in x:
            h = self.cell(item, h)
        return h


def models() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """Return ten models with arguments, by name; no iteration of theirs can be saved."""
    return {
        "one-layer MLP": (nn.Linear(64, 64), (torch.randn(8, 64),)),
        "three-layer MLP": (
            nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)),
            (torch.randn(8, 64),),
        ),
        "CNN": (
            nn.Sequential(
                nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(512, 10),
            ),
            (torch.randn(4, 1, 28, 28),),
        ),
        "residual block": (ResidualBlock(16), (torch.randn(2, 16, 16, 16),)),
        "transformer block": (
            nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True),
            (torch.randn(2, 32, 64),),
        ),
        "causal attention": (Attention(64, 4), (torch.randn(2, 32, 64),)),
        "bag of words": (Classifier(), (torch.randint(0, 1000, (8, 16)),)),
        "mixer block": (Mixer(16, 64), (torch.randn(2, 16, 64),)),
        "transposed convolutions": (
            nn.Sequential(
                nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Sigmoid(),
            ),
            (torch.randn(4, 32, 7, 7),),
        ),
        "RNN loop, T=32": (Recurrent(64), (torch.randn(32, 4, 64),)),
    }  # fmt: skip


class Overhead(Benchmark):
    """A compiled call may take 1.05 times the original's, or 20 microseconds more."""

    name = "overhead"
    summary = "ten models that gain nothing: compiled call beside original call"

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each model."""
        torch.manual_seed(settings.seed)
        for case, (model, arguments) in models().items():
            model = model.eval().to(settings.device)
            inputs = tuple(argument.to(settings.device) for argument in arguments)
            compiled = fxjacobi.compile(model)
            with torch.no_grad():
                compiled(*inputs)
                assert_equal_bits(compiled(*inputs), model(*inputs))
                calls = [partial(model, *inputs), partial(compiled, *inputs)]
                original_s, compiled_s = interleaved(calls, rounds=4 * settings.rounds, sample_s=0.02, warmup=5)
            more_us = (compiled_s - original_s) * 1e6
            yield Row(
                case,
                {
                    "original_us": original_s * 1e6,
                    "compiled_us": compiled_s * 1e6,
                    "ratio": compiled_s / original_s,
                    "more_us": more_us,
                    "within": compiled_s <= 1.05 * original_s or more_us <= 20,
                    "equal": True,
                },
            )
