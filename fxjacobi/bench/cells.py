"""Loops of recurrent cells, with weights as they are initialised or trained, and ``torch.nn``'s own fused twins."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxjacobi.bench.example_models import example

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxjacobi.bench.benchmark import Settings

__all__ = ["KINDS", "CellCase", "CellLoop", "average", "average_step", "relative_error"]

KINDS: dict[str, tuple[Callable[[int, int], nn.Module], Callable[[int, int], nn.Module]]] = {
    "GRU": (nn.GRUCell, nn.GRU),
    "LSTM": (nn.LSTMCell, nn.LSTM),
    "RNN": (nn.RNNCell, nn.RNN),
}


class CellLoop(nn.Module):
    """``h_t = cell(x_t, h_{t-1})``; ``x`` ``(T, B, I)`` to the states ``(T, B, H)``.

    Args:
        cell: One of torch.nn's cells.
        step: What is called instead of the cell, by default the cell itself.
    """

    def __init__(self, cell: nn.Module, step: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.cell = cell
        self.step = step if step is not None else cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return every state."""
        state = None
        rows = []
        for t in range(x.shape[0]):
            state = self.step(x[t], state)
            rows.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(rows)


def average_step(h: torch.Tensor, x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """One step of an exponential average, ``(B, H)``."""
    return decay * h + (1 - decay) * x


def average(x: torch.Tensor, decay: torch.Tensor, step: Callable[..., torch.Tensor] = average_step) -> torch.Tensor:
    """``h_t = decay_t h_{t-1} + (1 - decay_t) x_t``, affine in the state; ``(T, B, H)``."""
    h = torch.zeros_like(x[0])
    rows = []
    for t in range(x.shape[0]):
        h = step(h, x[t], decay[t])
        rows.append(h)
    return torch.stack(rows)


@dataclass(frozen=True)
class CellCase:
    """A loop of one kind of cell on one input.

    Args:
        kind: A key of :data:`KINDS`.
        weights: ``"default"``: as torch initialises them, on noise of the state's width. ``"rows"`` or ``"pixels"``:
            trained to predict the next row or pixel of a digit (``examples/rnn_digits.py``), on digits one after another.
        steps: ``T``.
        batch: ``B``.
        hidden: ``H`` of default weights; the trained ones have 128.
    """

    kind: str
    weights: str
    steps: int
    batch: int
    hidden: int = 128

    @property
    def name(self) -> str:
        """What its row is called."""
        trained = "" if self.weights == "default" else f" trained by {self.weights}"
        return f"{self.kind}{trained}, T={self.steps}, B={self.batch}"

    def loop(self, settings: Settings) -> CellLoop:
        """Return the loop, on the device."""
        torch.manual_seed(settings.seed)
        if self.weights == "default":
            cell: nn.Module = KINDS[self.kind][0](self.hidden, self.hidden)
        else:
            cell = example("rnn_digits").digits_model(self.kind.lower(), self.weights).cell.cell
        return CellLoop(cell.to(settings.device)).requires_grad_(False)

    def inputs(self, settings: Settings, seed: int = 1) -> torch.Tensor:
        """Return ``x`` ``(T, B, I)``, on the device; another seed gives other noise, or other digits."""
        generator = torch.Generator().manual_seed(settings.seed + seed)
        if self.weights == "default":
            return torch.randn(self.steps, self.batch, self.hidden, generator=generator).to(settings.device)
        digits = example("rnn_digits").sequences(self.weights)
        count = -(-self.steps // digits.shape[1])
        chosen = torch.randint(digits.shape[0], (self.batch, count), generator=generator)
        streams: torch.Tensor = digits[chosen].flatten(1, 2)[:, : self.steps]
        return streams.transpose(0, 1).clone(memory_format=torch.contiguous_format).to(settings.device)

    def fused(self, loop: CellLoop) -> nn.Module:
        """Return torch.nn's own loop (cuDNN's on CUDA) with the same weights."""
        weights = loop.cell.state_dict()
        hidden, width = weights["weight_hh"].shape[1], weights["weight_ih"].shape[1]
        library = KINDS[self.kind][1](width, hidden)
        library.load_state_dict({f"{name}_l0": value for name, value in weights.items()})
        return library.to(weights["weight_hh"].device).requires_grad_(False)


def in_float64(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``model`` with its parameters in float64; a function computes in its arguments' dtype."""
    return copy.deepcopy(model).double() if isinstance(model, nn.Module) else model


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return ``max |found - exact| / max |exact|``."""
    return float((found.double() - exact).abs().max() / exact.abs().max())
