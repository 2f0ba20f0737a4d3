"""The checks of tests/gpu on the CPU, as it is and with the double of a graph runner, so that their logic is tested."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings

import fxjacobi
from fxjacobi.device import installed
from fxjacobi.testing import Program, programs
from fxjacobi.testing.graph_double import GraphDouble, host_reads
from tests.gpu import checks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CPU = torch.device("cpu")
OUTCOMES: Counter[str] = Counter()


@pytest.fixture(params=["as it is", "with graphs"])
def double(request: pytest.FixtureRequest) -> Iterator[GraphDouble | None]:
    if request.param == "as it is":
        yield None
        return
    graphs = GraphDouble()
    with installed("cpu", graphs):
        yield graphs


@settings(max_examples=min(20, settings().max_examples))
@given(programs())
def check_program(program: Program) -> None:
    with installed("cpu", GraphDouble()):
        checks.check_program(program, CPU, OUTCOMES)


def test_programs_with_graphs() -> None:
    OUTCOMES.clear()
    check_program()
    assert OUTCOMES["solved"] > OUTCOMES["original"] / 3, f"too few calls ran an emitted module: {OUTCOMES}"


def test_a_planted_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = fxjacobi.SolvedModule.forward
    monkeypatch.setattr(
        fxjacobi.SolvedModule,
        "forward",
        lambda self, *a, **k: torch.nextafter(forward(self, *a, **k), torch.tensor(9.0)),
    )
    with pytest.raises(AssertionError, match="differ"):
        checks.check_gru_exact(CPU)


@pytest.mark.parametrize("check", [checks.check_made, checks.check_gru_exact, checks.check_several_at_once])
def test_checks(check: Callable[[torch.device], None], double: GraphDouble | None) -> None:
    check(CPU)
    assert double is None or double.captures > 0


def test_memory_limit() -> None:
    checks.check_memory_limit(CPU)


def test_zukos_inverse(double: GraphDouble | None) -> None:
    pytest.importorskip("zuko")
    checks.check_flow_inverse(CPU)
    assert double is None or double.captures > 0


def test_pixelcnnpp() -> None:
    checks.check_pixelcnnpp(CPU, 1)


@pytest.mark.parametrize("method", ["windowed", "chunked"])
def test_gru_at_a_tolerance(method: str, double: GraphDouble | None) -> None:
    checks.check_gru_tolerance(CPU, method)


def test_refused_and_recovered(double: GraphDouble | None) -> None:
    checks.check_refused_and_recovered(CPU, captures=double is not None)


@contextlib.contextmanager
def no_reads() -> Iterator[None]:
    with host_reads() as reads:
        yield
    assert not [read for read in reads if "random" not in read], reads


@pytest.mark.parametrize("name", ["fixed point", "exact recurrence"])
def test_nothing_is_read_back(name: str) -> None:
    with installed("cpu", GraphDouble()):
        checks.check_quiet(name, CPU, no_reads)
