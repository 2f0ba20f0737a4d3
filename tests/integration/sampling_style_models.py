"""Autoregressive networks as people write them, for the loops in ``sampling_styles``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

__all__ = ["GPT", "MADE", "RGB", "STEPS", "ChannelMADE", "Mixture", "PixelCNN", "StepNet", "WaveNet", "WithSample"]

STEPS = 12


class MaskedLinear(nn.Linear):
    mask: torch.Tensor

    def __init__(self, inputs: int, outputs: int, mask: torch.Tensor) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.mask * self.weight, self.bias)


class MADE(nn.Module):
    def __init__(
        self, d: int = STEPS, h: int = 32, out: int = 2, order: list[int] | None = None, cond: int = 0
    ) -> None:
        super().__init__()
        pos = torch.arange(d) if order is None else torch.argsort(torch.as_tensor(order))
        degree = torch.arange(h) % (d - 1)
        self.d, self.out = d, out
        self.first = MaskedLinear(d, h, (degree[:, None] >= pos[None]).float())
        self.second = MaskedLinear(h, h, (degree[:, None] >= degree[None]).float())
        self.last = MaskedLinear(h, d * out, (pos[:, None] > degree[None]).float().repeat_interleave(out, 0))
        self.condition = nn.Linear(cond, h) if cond else None

    def forward(self, x: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        h = self.first(x)
        if self.condition is not None:
            h = h + self.condition(c)
        h = self.second(h.relu()).relu()
        out: torch.Tensor = self.last(h).view(x.shape[0], self.d, self.out)
        return out


class GPT(nn.Module):
    tril: torch.Tensor

    def __init__(self, vocab: int = 7, w: int = 16, length: int = STEPS, layers: int = 2, mode: str = "sdpa") -> None:
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab + 1, w), nn.Embedding(length + 1, w)
        self.mode = mode
        self.norms = nn.ModuleList(nn.LayerNorm(w) for _ in range(2 * layers + 1))
        self.qkv = nn.ModuleList(nn.Linear(w, 3 * w) for _ in range(layers))
        self.proj = nn.ModuleList(nn.Linear(w, w) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(w, 2 * w) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * w, w) for _ in range(layers))
        self.head = nn.Linear(w, vocab, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(length + 1, length + 1)).bool())

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        batch, length = idx.shape
        x = self.emb(idx) + self.pos(torch.arange(length, device=idx.device))
        for i in range(len(self.qkv)):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).chunk(3, -1)
            q, k, v = (a.view(batch, length, 2, -1).transpose(1, 2) for a in (q, k, v))
            if self.mode == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                att = (q @ k.transpose(-2, -1)) * (1 / math.sqrt(k.size(-1)))
                att = att.masked_fill(~self.tril[:length, :length], float("-inf"))
                y = att.softmax(-1) @ v
            x = x + self.proj[i](y.transpose(1, 2).contiguous().view(batch, length, -1))
            x = x + self.down[i](F.gelu(self.up[i](self.norms[2 * i + 1](x))))
        logits: torch.Tensor = self.head(self.norms[-1](x))
        return logits


class MaskedConv(nn.Conv2d):
    mask: torch.Tensor

    def __init__(self, kind: str, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        mask = torch.ones_like(self.weight)
        _, _, h, w = mask.shape
        mask[:, :, h // 2, w // 2 + (kind == "B") :] = 0
        mask[:, :, h // 2 + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class RewritingConv(MaskedConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data *= self.mask
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class PixelCNN(nn.Module):
    def __init__(self, c: int = 1, f: int = 8, out: int = 4, norm: bool = False, rewrites: bool = False) -> None:
        super().__init__()
        conv = RewritingConv if rewrites else MaskedConv
        layers: list[nn.Module] = [conv("A", c, f, 5, padding=2)]
        for _ in range(2):
            if norm:
                layers.append(nn.BatchNorm2d(f))
            layers += [nn.ReLU(), conv("B", f, f, 3, padding=1)]
        self.net = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(f, out, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


class CausalConv(nn.Conv1d):
    def __init__(self, inputs: int, outputs: int, k: int, dilation: int = 1) -> None:
        super().__init__(inputs, outputs, k, dilation=dilation)
        self.left = (k - 1) * dilation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (self.left, 0)))


class WaveNet(nn.Module):
    def __init__(self, q: int = 8, f: int = 8) -> None:
        super().__init__()
        self.q = q
        self.start = CausalConv(q, f, 2)
        self.filters = nn.ModuleList(CausalConv(f, f, 2, d) for d in (1, 2, 4))
        self.gates = nn.ModuleList(CausalConv(f, f, 2, d) for d in (1, 2, 4))
        self.skips = nn.ModuleList(nn.Conv1d(f, f, 1) for _ in range(3))
        self.out = nn.Conv1d(f, q, 1)

    def forward(self, onehot: torch.Tensor) -> torch.Tensor:
        x = self.start(F.pad(onehot, (1, 0))[:, :, :-1])
        total = torch.zeros_like(x)
        for f, g, s in zip(self.filters, self.gates, self.skips, strict=True):
            h = torch.tanh(f(x)) * torch.sigmoid(g(x))
            total = total + s(h)
            x = x + h
        out: torch.Tensor = self.out(total.relu())
        return out


class StepNet(nn.Module):
    """What each step is conditioned on goes into the head."""

    def __init__(self) -> None:
        super().__init__()
        self.made, self.head, self.time = MADE(), nn.Linear(4, 2), nn.Embedding(STEPS, 4)


class RGB(nn.Module):
    """A head for each channel, which sees the channels before it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PixelCNN(3, 8, 6)
        self.heads = nn.ModuleList(nn.Linear(6 + c, 2) for c in range(3))


class ChannelMADE(nn.Module):
    """Ordered by pixels, and by channels within a pixel."""

    def __init__(self, side: int = 3) -> None:
        super().__init__()
        self.made, self.side = MADE(3 * side * side, 40, 2), side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.permute(0, 2, 3, 1).reshape(len(x), -1)
        out: torch.Tensor = self.made(flat).view(len(x), self.side, self.side, 3, 2)
        return out


class WithSample(nn.Module):
    """A model with a method that samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = MADE(out=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out

    @torch.no_grad()
    def sample(self, n: int) -> torch.Tensor:
        was = self.training
        self.eval()
        x = torch.zeros(n, STEPS, device=next(self.parameters()).device)
        for i in range(STEPS):
            logits = self(x)[:, i]
            x[:, i] = torch.multinomial(torch.softmax(logits, 1), 1).view(-1).to(x.dtype) - 1.0
        self.train(was)
        return x


class Mixture(nn.Module):
    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.made = MADE(out=3 * k)
