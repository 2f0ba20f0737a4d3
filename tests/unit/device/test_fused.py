"""Fused kernels are a candidate within a tolerance: compiled, compared, timed, and only then used."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from fxjacobi.certificate import Certificate
from fxjacobi.device import Refused, chunked, installed
from fxjacobi.device.fused import fused
from fxjacobi.methods.chunked import Chunked
from fxjacobi.solved_loop import SolvedLoop
from fxjacobi.testing.graph_double import GraphDouble
from tests.unit.device.test_chunked import CONTRACT, recurrence

if TYPE_CHECKING:
    from torch import fx


@pytest.mark.skipif(shutil.which("c++") is None, reason="Inductor needs a compiler")
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_body_compiled_by_inductor_agrees_with_it() -> None:
    loop, operands = recurrence(8)
    h = torch.randn(5, 8)
    arguments = [h, h, torch.randn(5, 8), operands[1]]
    compiled = fused(loop.body, arguments)
    assert not isinstance(compiled, Refused), compiled.reason
    for found, wanted in zip(compiled(*arguments), loop.body(*arguments), strict=True):
        torch.testing.assert_close(found, wanted)


def test_what_inductor_does_not_take_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import _inductor

    loop, operands = recurrence(8)
    h = torch.randn(5, 8)
    arguments = [h, h, torch.randn(5, 8), operands[1]]
    assert isinstance(fused(loop.body, [*arguments[:3], 1.0]), Refused)

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(_inductor, "compile", broken)
    assert isinstance(fused(loop.body, arguments), Refused)
    monkeypatch.setattr(_inductor, "compile", lambda graph, *_, **__: lambda *a: [v * 1.01 for v in graph(*a)])
    refused = fused(loop.body, arguments)
    assert isinstance(refused, Refused)
    assert "more than rounding" in refused.reason


@pytest.mark.parametrize(("seconds", "kept"), [([2.0, 1.0], True), ([1.0, 2.0], False)])
def test_the_faster_sweep_is_kept(monkeypatch: pytest.MonkeyPatch, seconds: list[float], kept: bool) -> None:
    runs = []

    def compiled(graph: fx.GraphModule, _: Any) -> Any:
        def run(*arguments: Any) -> Any:
            runs.append(1)
            return graph(*arguments)

        return run

    monkeypatch.setattr(chunked, "fused", compiled)
    monkeypatch.setattr(chunked, "interleaved", lambda *_, **__: seconds)
    loop, operands = recurrence(64, batch=1)
    block, double = SolvedLoop(loop, Chunked(16), CONTRACT), GraphDouble()
    block.fuse = True
    with torch.no_grad(), installed("cpu", double):
        block(*operands)
        assert runs
        (found,) = block(*operands)
    assert float((found - loop(*operands)[0]).abs().max()) < 1e-3
    assert block.last is not None
    assert block.last.certificate is Certificate.RESIDUAL
    assert ("not fused" in block.reason) != kept
    assert "2000.000 ms" in block.reason
    assert double.captures == (5 if kept else 4)
