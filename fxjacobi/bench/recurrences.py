"""Float recurrences in the tolerance contract, beside the eager loop and ``torch.nn``'s own fused loops."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

import fxjacobi
from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.timing import interleaved, once

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Recurrences"]

_RTOL = 1e-5


class _Loop(nn.Module):
    """``h_t = cell(x_t, h_{t-1})``; ``x`` ``(T, B, H)`` to ``(T, B, H)``."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = None
        rows = []
        for t in range(x.shape[0]):
            state = self.cell(x[t], state)
            rows.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(rows)


def _average(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    h = torch.zeros_like(x[0])
    rows = []
    for t in range(x.shape[0]):
        h = decay[t] * h + (1 - decay[t]) * x[t]
        rows.append(h)
    return torch.stack(rows)


class Recurrences(Benchmark):
    """Cells of width 128 at rtol 1e-5, and an affine recurrence; errors are against a float64 run."""

    name = "recurrences"
    summary = f"H=128, rtol={_RTOL:g}, default initialisation; error relative to the largest state, against float64"

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each cell, length and batch."""
        torch.manual_seed(settings.seed)
        cases = [
            (nn.GRUCell, nn.GRU, 1024, 1),
            (nn.GRUCell, nn.GRU, 4096, 1),
            (nn.GRUCell, nn.GRU, 1024, 8),
            (nn.LSTMCell, nn.LSTM, 1024, 1),
            (nn.RNNCell, nn.RNN, 1024, 1),
        ]
        for kind, fused, steps, batch in cases:
            model, x = _Loop(kind(128, 128)), torch.randn(steps, batch, 128)
            library = fused(128, 128)
            row = self._measure(f"{kind.__name__}, T={steps}, B={batch}", settings, model, (x,))
            with torch.no_grad():
                (row["torch_nn_s"],) = interleaved([partial(library, x)], rounds=settings.rounds)
            yield Row(str(row.pop("case")), row)
        x, decay = torch.randn(4096, 1, 128), torch.rand(4096, 1, 128)
        row = self._measure("affine, T=4096, B=1", settings, _average, (x, decay))
        yield Row(str(row.pop("case")), row)

    @staticmethod
    def _measure(
        case: str, settings: Settings, model: Callable[..., torch.Tensor], args: tuple[torch.Tensor, ...]
    ) -> dict[str, float | int | str | bool]:
        compiled = fxjacobi.compile(model, rtol=_RTOL)
        with torch.no_grad():
            _, first_s = once(partial(compiled, *args))
            found, ordinary = compiled(*args), model(*args)
            module = model.double() if isinstance(model, nn.Module) else model
            exact = module(*(a.double() for a in args))
            if isinstance(model, nn.Module):
                model.float()
            scale = exact.abs().max()
            ordinary_s, solved_s = interleaved(
                [partial(model, *args), partial(compiled, *args)], rounds=settings.rounds
            )
        solver = next((b.method for b in reversed(compiled.plan.blocks) if b.kind and b.kind.value == "recurrence"), "")
        return {
            "case": case,
            "method": solver if compiled.plan.solved else "original",
            "sweeps": compiled.report.sweeps,
            "ordinary_s": ordinary_s,
            "first_call_s": first_s,
            "solved_s": solved_s,
            "ratio": ordinary_s / solved_s,
            "error": float((found.double() - exact).abs().max() / scale),
            "ordinary_error": float((ordinary.double() - exact).abs().max() / scale),
        }
