"""Loops whose iterations do not wait for each other: attention written head by head, experts run one after another."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HeadByHead(nn.Module):
    """Causal attention, (B, T, heads * width) -> the same shape, with one Python iteration a head."""

    def __init__(self, heads: int = 12, width: int = 32) -> None:
        super().__init__()
        self.query, self.key, self.value = (
            nn.ModuleList(nn.Linear(heads * width, width) for _ in range(heads)) for _ in range(3)
        )
        self.out = nn.Linear(heads * width, heads * width)

    def forward(self, x: Tensor) -> Tensor:
        """Each head attends by itself; their results lie side by side."""
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        heads = []
        for query, key, value in zip(self.query, self.key, self.value, strict=True):
            k = key(x)
            scores = query(x) @ k.transpose(-1, -2) / k.shape[-1] ** 0.5
            heads.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ value(x))
        y: Tensor = self.out(torch.cat(heads, dim=-1))
        return y


class Experts(nn.Module):
    """A dense mixture of experts, (B, width) -> (B, width): every expert runs, weighted by a softmax gate."""

    def __init__(self, experts: int = 16, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The weighted sum of the experts' answers."""
        weights = self.gate(x).softmax(-1)
        answers = [expert(x) for expert in self.experts]
        y: Tensor = (torch.stack(answers, dim=1) * weights.unsqueeze(-1)).sum(1)
        return y


def main() -> None:
    """Run both ordinarily and compiled; print the times."""
    from compare import compare

    torch.manual_seed(0)
    heads, experts = HeadByHead().eval(), Experts().eval()
    with torch.no_grad():
        compare("attention, 12 heads in a loop", heads, torch.randn(2, 64, 384))
        compare("16 experts in a loop", experts, torch.randn(32, 64))


if __name__ == "__main__":
    main()
