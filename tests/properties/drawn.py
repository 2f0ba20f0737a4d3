"""Constants of a drawn network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

__all__ = ["Drawn", "Layer"]

Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Drawn:
    """Constants of a drawn network: values, and whether the analysis knows them."""

    draw: Any
    values: list[torch.Tensor] = field(default_factory=list)
    known: list[bool] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def pick(self, *choices: Any) -> Any:
        return self.draw(st.sampled_from(choices))

    def random(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.draw(st.integers(0, 10_000)))
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def mask(self, *shape: int) -> torch.Tensor:
        """0/1 entries: all ones, a triangle (whole or strict), or random."""
        kind = self.pick("ones", "lower", "strict", "random")
        full = torch.ones(shape, dtype=torch.float64)
        if kind == "ones" or len(shape) < 2:
            return full
        if kind == "random":
            return (self.random(*shape) > 0).double()
        return full.tril(0 if kind == "lower" else -1)

    def add(self, value: torch.Tensor, *, known: bool | None = None) -> int:
        self.values.append(value)
        self.known.append(self.draw(st.booleans()) if known is None else known)
        return len(self.values) - 1
