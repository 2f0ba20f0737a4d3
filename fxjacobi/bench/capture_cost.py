"""What the first call costs: recording, rolling and planning a loop of GRU cells, of growing length."""

from __future__ import annotations

import shutil
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

import fxjacobi
from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.capture import record
from fxjacobi.testing.assertions import assert_equal_bits
from fxjacobi.timing import interleaved, once

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CaptureCost", "CompileTime", "GRULoop"]


class GRULoop(nn.Module):
    """``h_t = GRUCell(x_t, h_{t-1})``, written as a loop; ``x`` ``(T, B, H)`` to ``(T, B, H)``."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return every state."""
        h = torch.zeros_like(x[0])
        states = []
        for t in range(x.shape[0]):
            h = self.cell(x[t], h)
            states.append(h)
        return torch.stack(states)


def _loop(settings: Settings, steps: int) -> tuple[GRULoop, torch.Tensor]:
    torch.manual_seed(settings.seed)
    return GRULoop(64).to(settings.device), torch.randn(steps, 8, 64).to(settings.device)


def _elementwise(x: torch.Tensor, operations: int) -> torch.Tensor:
    """``operations`` operations on ``x``, all in one loop: nothing that could be recorded once and called again."""
    for _ in range(operations // 4):
        x = torch.tanh(x * 0.5 + 0.1) - 0.2
    return x


def _cost(case: str, ordinary_s: float, first_s: float, unit: str, units: int) -> Row:
    return Row(
        case,
        {
            "ordinary_s": ordinary_s,
            "first_call_s": first_s,
            "more_s": first_s - ordinary_s,
            f"more_per_{unit}_us": (first_s - ordinary_s) / units * 1e6,
            "ratio": first_s / ordinary_s,
            "equal": True,
        },
    )


class CaptureCost(Benchmark):
    """First call beside ordinary call at T = 256, 1k, 4k and 16k, and recording alone; both must grow linearly."""

    name = "capture-cost"
    summary = "first call of a GRU-cell loop (H=64, B=8) beside its ordinary run"

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each length, then one for each number of operations recorded."""
        for steps in (16,) if settings.quick else (256, 1024, 4096, 16384):
            model, x = _loop(settings, steps)
            with torch.no_grad():
                (ordinary_s,) = interleaved([partial(model, x)], rounds=3)
                result, first_s = once(partial(fxjacobi.compile(model), x))
                assert_equal_bits(result, model(x))
            yield _cost(f"T={steps}", ordinary_s, first_s, "step", steps)
        for operations in (64,) if settings.quick else (1_000, 4_000, 16_000):
            yield self._recording(settings, operations)

    @staticmethod
    def _recording(settings: Settings, operations: int) -> Row:
        """Recording alone, without the passes, the plan and the check that follow it."""
        x = torch.full((8, 64), 0.5, device=settings.device)
        with torch.no_grad():
            (ordinary_s,) = interleaved([partial(_elementwise, x, operations)], rounds=3)
            recorded, first_s = once(partial(record, _elementwise, (x, operations), {}))
        assert recorded.capture is not None
        assert recorded.capture.operations == operations
        assert_equal_bits(recorded.result, _elementwise(x, operations))
        return _cost(f"recording alone, {operations} operations", ordinary_s, first_s, "operation", operations)


class CompileTime(Benchmark):
    """The first call of ``torch.compile`` on the same loop, beside ours. It takes minutes: dynamo unrolls the loop."""

    name = "compile-time"
    summary = "first call of a GRU-cell loop, T=512: torch.compile beside fxjacobi (takes minutes)"

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for the ordinary run, for fxjacobi and for torch.compile."""
        model, x = _loop(settings, 512)
        # Inductor needs a C++ compiler for the CPU; without one, what it does before code generation is measured.
        backend = "inductor" if settings.device.type == "cuda" or shutil.which("c++") else "aot_eager"
        with torch.no_grad():
            wanted, _ = once(partial(model, x))
            (ordinary_s,) = interleaved([partial(model, x)], rounds=3)
            yield Row("ordinary run", {"first_call_s": ordinary_s, "equal": True})
            result, first_s = once(partial(fxjacobi.compile(model), x))
            assert_equal_bits(result, wanted)
            yield Row("fxjacobi", {"first_call_s": first_s, "ratio": first_s / ordinary_s, "equal": True})
            theirs = torch.compile(model, backend=backend)
            other, first_s = once(partial(theirs, x))
            values = {"first_call_s": first_s, "ratio": first_s / ordinary_s, "equal": bool(torch.equal(other, wanted))}
            yield Row(f"torch.compile, {backend}", values)
