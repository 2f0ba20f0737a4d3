"""The whole compiler with the CPU double as its device: captured blocks, equal bits, reasons in the plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import fxjacobi
from fxjacobi.device import installed
from fxjacobi.testing.graph_double import GraphDouble
from tests.gpu import checks
from tests.unit.sampling_models import made

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def double() -> Iterator[GraphDouble]:
    """A device."""
    found = GraphDouble()
    with installed("cpu", found):
        yield found


def gru_loop(x: torch.Tensor, cell: nn.GRUCell, h: torch.Tensor) -> torch.Tensor:
    states = []
    for t in range(x.shape[0]):
        h = cell(x[t], h)
        states.append(h)
    return torch.stack(states)


class Sampler(nn.Module):
    def __init__(self, size: int = 12) -> None:
        super().__init__()
        self.size, self.net = size, made(size, 32)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for t in range(self.size):
            out = self.net(x)
            x[:, t] = out[:, t] + torch.exp(out[:, self.size + t]) * torch.randn(x.shape[0])
        return x


class Inverse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8).tril(-1) * 0.3)

    @torch.no_grad()
    def forward(self, y: torch.Tensor) -> torch.Tensor:
        x = torch.zeros_like(y)
        for _ in range(60):
            x = y - torch.tanh(x @ self.weight.t())
        return x


def equal_three_times(model: Callable[..., torch.Tensor], *args: torch.Tensor) -> fxjacobi.SolvedModule:
    compiled = fxjacobi.compile(model, measure=False)
    for seed in range(3):
        torch.manual_seed(seed)
        wanted = model(*args)
        torch.manual_seed(seed)
        assert torch.equal(compiled(*args), wanted)
        assert seed == 0 or compiled.report.solved, compiled.report.reason
    return compiled


def test_sampling(double: GraphDouble) -> None:
    compiled = equal_three_times(Sampler(), torch.zeros(3, 12))
    assert double.captures == 2
    assert "each sweep is a captured graph" in str(compiled.plan)


def test_fixed_points(double: GraphDouble) -> None:
    compiled = equal_three_times(Inverse(), torch.randn(4, 8))
    assert double.captures == 1
    assert "each step is a captured graph" in str(compiled.plan)
    assert compiled.report.sweeps < 20


def test_recurrences_in_order(double: GraphDouble) -> None:
    cell = nn.GRUCell(4, 8)
    with torch.no_grad():
        compiled = equal_three_times(lambda x: gru_loop(x, cell, torch.zeros(2, 8)), torch.randn(70, 2, 4))
    assert double.captures >= 1
    assert "one captured graph" in " ".join(block.reason for block in compiled.plan.blocks)
    assert any(block.method == "step graphs" for block in compiled.plan.blocks)


def test_chunks_within_a_tolerance(double: GraphDouble) -> None:
    cell = nn.GRUCell(4, 8)
    x = torch.randn(256, 2, 4)
    with torch.no_grad():
        compiled = fxjacobi.compile(
            lambda x: gru_loop(x, cell, torch.zeros(2, 8)), rtol=1e-4, method="chunked", measure=False
        )
        wanted = gru_loop(x, cell, torch.zeros(2, 8))
        for _ in range(3):
            assert float((compiled(x) - wanted).abs().max()) < 1e-3
    assert "each sweep is a captured graph" in str(compiled.plan)


def test_without_a_device_nothing_is_captured() -> None:
    compiled = equal_three_times(Inverse(), torch.randn(4, 8))
    assert "captured" not in str(compiled.plan)


def test_inside_a_capture_of_the_users_own_the_original_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def model(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x + 1

    compiled = fxjacobi.compile(model)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        compiled(torch.ones(2))
    assert len(calls) == 2
    assert not compiled._specialisations


def test_the_gpu_tests_own_checks_hold_on_the_double(double: GraphDouble) -> None:
    cpu = torch.device("cpu")
    checks.check_refused_and_recovered(cpu, captures=True)
    checks.check_gru_exact(cpu)
    checks.check_flow_inverse(cpu)
    assert double.captures >= 3
    assert double.refusals
