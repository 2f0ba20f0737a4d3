"""Small autoregressive networks: causal by masks, by shifts, by attention, or (planted) not."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["Attention", "Encoder", "MaskedConv", "MaskedLinear", "Shifted", "made", "pixel_cnn"]


class MaskedLinear(nn.Linear):
    """A linear layer whose weight is multiplied by a mask (arXiv 1502.03509)."""

    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight * self.mask, self.bias)


def made(size: int, hidden: int) -> nn.Sequential:
    """A MADE of two hidden layers that gives a mean and a log scale for each of ``size`` dimensions."""
    torch.manual_seed(0)
    inputs, units = torch.arange(size), torch.arange(hidden) % (size - 1)
    first = (units[:, None] >= inputs[None]).float()
    second = (units[:, None] >= units[None]).float()
    last = (inputs[:, None] > units[None]).float().repeat(2, 1)
    layers = [MaskedLinear(first), nn.ReLU(), MaskedLinear(second), nn.ReLU(), MaskedLinear(last)]
    return nn.Sequential(*layers).eval()


class MaskedConv(nn.Conv2d):
    """A convolution over what comes before a pixel in raster order (kind A), or up to it (kind B)."""

    mask: torch.Tensor

    def __init__(self, inputs: int, outputs: int, size: int, kind: str, planted: str | None = None) -> None:
        super().__init__(inputs, outputs, size, padding=size // 2)
        mask, centre = torch.ones_like(self.weight), size // 2
        mask[:, :, centre, centre + (kind == "B") :] = 0
        mask[:, :, centre + 1 :] = 0
        if planted == "centre":
            mask[:, :, centre, centre] = 1
        elif planted == "ahead":
            mask[:, :, centre, centre + 1] = 1
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(x, self.weight * self.mask, self.bias, padding=self.padding)


def pixel_cnn(
    channels: int = 8, first: str | None = None, third: str | None = None, norm: nn.Module | None = None
) -> nn.Sequential:
    """A PixelCNN of three masked convolutions (arXiv 1606.05328), with planted leaks or a normalisation."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [MaskedConv(1, channels, 5, "A", first), nn.ELU(), MaskedConv(channels, channels, 3, "B")]
    if norm is not None:
        layers.append(norm)
    layers += [nn.ELU(), MaskedConv(channels, channels, 3, "B", third), nn.ELU(), nn.Conv2d(channels, 2, 1)]
    return nn.Sequential(*layers)


class Shifted(nn.Module):
    """Down and right stacks of shifted, unmasked convolutions (arXiv 1701.05517, section 2.3)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv2d(1, channels, (2, 3))
        self.right = nn.Conv2d(1, channels, (1, 2))
        self.up = nn.ConvTranspose2d(channels, channels, (2, 1), groups=2)
        self.out = nn.Conv2d(channels, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        above = self.down(functional.pad(x, (1, 1, 2, 0)))[:, :, :-1]
        left = self.right(functional.pad(x, (2, 0, 0, 0)))[:, :, :, :-1]
        mixed = functional.elu(above + left)
        out: torch.Tensor = self.out(functional.elu(self.up(mixed)[:, :, :-1]))
        return out


class Attention(nn.Module):
    """Two layers of causal self-attention over shifted tokens, masked in one of three ways."""

    mask: torch.Tensor

    def __init__(
        self, kind: str = "causal", vocabulary: int = 6, width: int = 8, length: int = 12, diagonal: int = 1
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.vocabulary, self.heads = kind, vocabulary, 2
        self.embedding = nn.Embedding(vocabulary + 1, width)
        self.position = nn.Parameter(torch.randn(length, width))
        self.project = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", torch.full((length, length), float("-inf")).triu(diagonal))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length = tokens.shape
        start = torch.full((batch, 1), self.vocabulary, dtype=torch.long)
        state = self.embedding(torch.cat([start, tokens[:, :-1]], 1)) + self.position
        for project, mix, norm in zip(self.project, self.mix, self.norm, strict=True):
            query, key, value = project(norm(state)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            if self.kind == "causal":
                seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            elif self.kind == "mask":
                seen = functional.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)
            else:
                seen = (query @ key.transpose(-1, -2) / 2 + self.mask).softmax(-1) @ value
            state = state + mix(seen.transpose(1, 2).reshape(batch, length, -1))
        logits: torch.Tensor = self.head(state)
        return logits


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a causal mask, which runs as one fused operation a layer."""

    mask: torch.Tensor

    def __init__(self, vocabulary: int = 6, width: int = 8, length: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vocabulary = vocabulary
        self.embedding = nn.Embedding(vocabulary + 1, width)
        layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        start = torch.full((len(tokens), 1), self.vocabulary, dtype=torch.long)
        state = self.embedding(torch.cat([start, tokens[:, :-1]], 1))
        logits: torch.Tensor = self.head(self.encoder(state, mask=self.mask, is_causal=True))
        return logits
