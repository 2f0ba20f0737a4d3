"""What a first call leaves behind, and what the second makes of it."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fxjacobi


class FillsACache(nn.Module):
    """Many models keep tables by size, and fill them when they first meet one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.sizes: dict[int, int] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] not in self.sizes:
            self.sizes[x.shape[1]] = len(self.sizes)
        for _ in range(40):
            x = torch.relu(self.layer(x)) * 0.01 + self.sizes[x.shape[1]]
        return x


class Counts(nn.Module):
    """A counter that changes at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


def test_a_cache_filled_once_is_recorded_at_the_second_call() -> None:
    model = FillsACache()
    compiled = fxjacobi.compile(model, measure=False)
    x = torch.randn(2, 6)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        first = compiled(x)
        kept = [compiled.plan]
        second = compiled(x)
        kept.append(compiled.plan)
        assert [plan.solved for plan in kept] == [False, True]
        assert "sizes" in kept[0].reason
        other = torch.randn(2, 6)
        assert torch.equal(compiled(other), model(other))
    assert torch.equal(first, second)


def test_a_counter_is_refused_at_the_second_call() -> None:
    model = Counts()
    compiled = fxjacobi.compile(model)
    x = torch.ones(3)
    assert torch.equal(compiled(x), x)
    with pytest.warns(fxjacobi.CaptureWarning, match="calls changed during the run"):
        assert torch.equal(compiled(x), 2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compiled(x), 3 * x)
    assert not compiled.plan.solved


def test_a_counter_is_refused_at_once_where_that_was_asked_for() -> None:
    with pytest.raises(fxjacobi.CaptureError, match="calls changed during the run"):
        fxjacobi.compile(Counts(), strict=True)(torch.ones(3))


def checked_map(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A fixed point whose every step looks at its value, as argument validation does."""
    for _ in range(200):
        if not bool(x.isfinite().all()):
            raise ValueError("not finite")
        x = torch.round(x @ weight * 4) / 8
    return x


def test_a_fixed_point_that_is_checked_at_each_step_stops_early() -> None:
    weight = torch.eye(5) * 0.5
    compiled = fxjacobi.compile(checked_map)
    with torch.no_grad():
        compiled(torch.randn(3, 5), weight)
        assert compiled.plan.solved, compiled.plan
        x = torch.randn(3, 5)
        assert torch.equal(compiled(x, weight), checked_map(x, weight))
        assert compiled.report.sweeps < 100
        with pytest.raises(ValueError, match="not finite"):
            compiled(x * float("inf"), weight)


def test_spectral_norm_in_training_mode_is_solved() -> None:
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))  # its iteration writes by out=
    buffers = list(layer.buffers())

    def repeated(x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = torch.tanh(layer(x))
        return x

    compiled = fxjacobi.compile(repeated, measure=False)
    with torch.no_grad():
        for _ in range(3):
            for buffer in buffers:  # far from where the iteration converges
                buffer.copy_(torch.nn.functional.normalize(torch.randn(6), dim=0))
            x, before = torch.randn(2, 6), [b.clone() for b in buffers]
            found, left = compiled(x), [b.clone() for b in buffers]
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            assert torch.equal(found, repeated(x))
            assert all(torch.equal(a, b) for a, b in zip(left, buffers, strict=True))
    assert compiled.report.solved, compiled.plan


@pytest.mark.parametrize("measure", [True, False])
def test_only_measuring_runs_the_callable_again(measure: bool, capsys: pytest.CaptureFixture[str]) -> None:
    def speaks(x: torch.Tensor) -> torch.Tensor:
        print("run")  # noqa: T201 - what is counted
        for _ in range(200):
            x = torch.tanh(x * 0.3 + 0.1)
        return x

    compiled = fxjacobi.compile(speaks, measure=measure)
    with torch.no_grad():
        compiled(torch.ones(4, 8))
        runs = capsys.readouterr().out.count("run")
        assert (1 < runs <= 6) if measure else runs == 1
        compiled(torch.ones(4, 8))
    assert capsys.readouterr().out == ("" if compiled.plan.solved else "run\n")
