"""Captured graphs on a CUDA device: refusals, synchronisation, streams, devices, memory, graphs of the user's own."""

from __future__ import annotations

import contextlib
import gc
import logging
from typing import TYPE_CHECKING

import pytest
import torch

import fxjacobi
from fxjacobi.testing import assert_equal_bits
from tests.gpu import checks

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
    # torch says so, once a process, whenever the mode is set that makes waiting for the device an error.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

CUDA = torch.device("cuda")


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_a_refused_capture_is_recovered_from() -> None:
    checks.check_refused_and_recovered(CUDA, captures=True)


@pytest.mark.parametrize("name", ["fixed point", "sampling", "exact recurrence", "chunked recurrence"])
def test_nothing_synchronises_inside_a_solve(name: str) -> None:
    checks.check_quiet(name, CUDA, no_synchronisation)


def test_the_check_of_synchronisation_can_fail() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), no_synchronisation():
        torch.ones(1, device=CUDA).item()


def test_several_modules_at_once() -> None:
    checks.check_several_at_once(CUDA)


def test_memory_limit() -> None:
    checks.check_memory_limit(CUDA)


@pytest.mark.parametrize("options", [{}, {"rtol": 1e-5, "method": "chunked"}])
def test_streams_other_than_the_default(options: dict[str, object]) -> None:
    model = checks.gru(CUDA)
    compiled = fxjacobi.compile(model, measure=False, **options)  # type: ignore[arg-type] # both sets are valid
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [checks.noise(CUDA, 120, 2, 8, seed=seed) for seed in range(9)]
    with torch.no_grad():
        wanted = [model(x) for x in inputs]
        compiled(inputs[0])
        compiled(inputs[0])
        found: list[torch.Tensor] = []
        for place, x in enumerate(inputs):
            stream = streams[place % 3]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(compiled(x))
    torch.cuda.synchronize()
    for a, b in zip(found, wanted, strict=True):
        if options:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        else:
            assert_equal_bits(a, b)


def test_the_first_call_may_come_on_a_side_stream() -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        compiled = fxjacobi.compile(checks.triangular, measure=False)
        for seed in range(3):
            args = checks.triangular_arguments(CUDA, seed)
            assert_equal_bits(compiled(*args), checks.triangular(*args))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_devices_other_than_the_current_one() -> None:
    other = torch.device("cuda", 1)
    assert torch.cuda.current_device() == 0
    checks.check_gru_exact(other)
    checks.check_gru_tolerance(other, "chunked")
    checks.check_made(other)
    compiled = fxjacobi.compile(checks.triangular, measure=False)
    with torch.no_grad():
        for device in (CUDA, other, CUDA, other):
            for seed in range(2):
                args = checks.triangular_arguments(device, seed)
                assert_equal_bits(compiled(*args), checks.triangular(*args))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("warm", [True, False], ids=["called before", "first called inside"])
def test_inside_a_graph_of_the_users_own(warm: bool) -> None:
    """A solve decides on the host when to stop, which a graph cannot: the user's graph holds the ordinary run."""
    compiled = fxjacobi.compile(checks.triangular, measure=False)
    x, weight = checks.triangular_arguments(CUDA)
    fresh = checks.triangular_arguments(CUDA, 1)[0]
    with torch.no_grad():
        checks.triangular(x, weight)  # what torch itself must make before a capture
        for _ in range(3 if warm else 0):
            compiled(x, weight)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = compiled(x, weight)
        x.copy_(fresh)
        graph.replay()
        assert_equal_bits(found, checks.triangular(fresh, weight))
        for seed in range(3):
            args = checks.triangular_arguments(CUDA, seed)
            assert_equal_bits(compiled(*args), checks.triangular(*args))


def test_out_of_memory_shrinks_the_window(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = checks.Widening().to(CUDA).requires_grad_(False)
    x = checks.noise(CUDA, 256, 512, 64)  # the states take 34 MB; a sweep over all steps would take 1 GB inside
    with torch.no_grad():
        wanted = model(x)
        compiled = fxjacobi.compile(model, rtol=1e-5, method="jacobi", measure=False)
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(CUDA).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (600 << 20)) / total)
        try:
            with caplog.at_level(logging.INFO, logger="fxjacobi"):
                compiled(x)
                found = compiled(x)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            torch.cuda.empty_cache()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert compiled.report.solved, compiled.report.reason
    assert any("does not fit in memory" in record.message for record in caplog.records)
