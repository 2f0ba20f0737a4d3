"""A table of sampling loops: what each is called with, and whether it must be collapsed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["STYLES", "Style", "style"]


@dataclass(frozen=True)
class Style:
    """A sampler.

    Args:
        sample: The loop, which runs without gradients.
        make: Returns its arguments, of which modules are put into evaluation unless they say otherwise.
        refused: Part of the reason for which it may not be collapsed; empty where it must be.
    """

    sample: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    refused: str

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments, the same in every process."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = self.make()
        if not self.refused:
            for one in made:
                if isinstance(one, nn.Module):
                    one.eval()
        return made


STYLES: dict[str, Style] = {}


def style(
    make: Callable[[], tuple[Any, ...]], *, refused: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add a sampler to the table, under its name."""

    def register(sample: Callable[..., Any]) -> Callable[..., Any]:
        STYLES[sample.__name__] = Style(torch.no_grad()(sample), make, refused)
        return sample

    return register
