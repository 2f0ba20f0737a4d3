"""``fxjacobi.scan`` inside a compiled function: recorded as one rolled loop, equal to the eager scan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fxjacobi
from fxjacobi.loops import Loop
from fxjacobi.trees import split
from fxjacobi.verify import equal


def _compiled_equals_eager(fn: Any, make: Any, calls: int = 3) -> fxjacobi.SolvedModule:
    compiled = fxjacobi.compile(fn, measure=False, strict=True)
    with torch.no_grad():
        for call in range(calls):
            torch.manual_seed(call)
            args = make()
            for a, b in zip(split(compiled(*args))[1], split(fn(*args))[1], strict=True):
                assert equal(a, b)
    assert compiled.report.solved
    return compiled


def test_pytrees_closures_and_unchanged_leaves() -> None:
    weight = torch.randn(4, 4) * 0.4

    def run(h: torch.Tensor, xs: torch.Tensor, gain: torch.Tensor) -> Any:
        def step(carry: Any, x: dict[str, torch.Tensor]) -> Any:
            a, total, fixed = carry
            new = torch.tanh(a @ weight + x["p"] * gain)
            return (new, total + new.sum(), fixed), {"y": new * 2, "z": x["p"] + a, "none": None}

        return fxjacobi.scan(step, (h, torch.zeros(()), gain), {"p": xs})

    compiled = _compiled_equals_eager(run, lambda: (torch.randn(2, 4), torch.randn(40, 2, 4), torch.randn(4)))
    (loop,) = [m for m in compiled.stages["capture"].children() if isinstance(m, Loop)]
    assert loop.trip_count == 40
    assert len(compiled.stages["capture"].graph.nodes) < 20  # not 40 steps of nodes


def test_reverse() -> None:
    def run(h: torch.Tensor, xs: torch.Tensor) -> Any:
        return fxjacobi.scan(lambda c, x: ((c * 0.5 + x).sin(), c), h, xs, reverse=True)

    _compiled_equals_eager(run, lambda: (torch.randn(3), torch.randn(12, 3)))


def test_a_step_that_branches_is_recorded_step_by_step() -> None:
    def step(c: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (c + x, c) if x.sum() > -100 else (c - x, c)

    compiled = _compiled_equals_eager(
        lambda h, xs: fxjacobi.scan(step, h, xs), lambda: (torch.randn(3), torch.rand(12, 3))
    )
    with torch.no_grad():
        xs = -100 * torch.ones(12, 3)
        found, wanted = compiled(torch.zeros(3), xs), fxjacobi.scan(step, torch.zeros(3), xs)
    assert equal(found[0], wanted[0])


def test_a_scan_that_draws() -> None:
    def run(h: torch.Tensor, xs: torch.Tensor) -> Any:
        return fxjacobi.scan(lambda c, x: (c + x * torch.rand(3), c), h, xs)

    compiled = fxjacobi.compile(run, measure=False)
    args = (torch.randn(3), torch.randn(9, 3))
    with torch.no_grad():
        for seed in range(3):
            torch.manual_seed(seed)
            found = compiled(*args)
            torch.manual_seed(seed)
            wanted = run(*args)
            assert equal(found[0], wanted[0])
            assert equal(found[1], wanted[1])


def test_the_first_value_of_a_carry_read_otherwise_is_no_carry() -> None:
    """Starting again from it, where data say so: on the recorded data nothing shows that it is not the carry."""

    def run(xs: torch.Tensor, again: torch.Tensor, h0: torch.Tensor) -> torch.Tensor:
        def step(h: torch.Tensor, each: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            x, starts = each
            h = torch.where(starts, h0, torch.tanh(0.5 * h + x))
            return h, h

        result: torch.Tensor = fxjacobi.scan(step, h0, (xs, again))[1]

        return result

    never, once = torch.zeros(40, 2, 1, dtype=torch.bool), torch.zeros(40, 2, 1, dtype=torch.bool)
    once[20] = True
    rows = torch.randn(9, 2, 4)
    with torch.no_grad():
        # Dense and aligned; expanded; starting between multiples of 64 bytes.
        for h0 in (torch.randn(2, 4), torch.randn(1, 4).expand(2, 4), rows[1]):
            compiled = fxjacobi.compile(run, measure=False)
            xs = torch.randn(40, 2, 4)
            compiled(xs, never, h0)
            for flags in (never, once):
                assert torch.equal(compiled(xs, flags, h0), run(xs, flags, h0))
                assert compiled.report.solved


@pytest.mark.parametrize("layout", ["steps first", "batch first", "expanded"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_slice_read_otherwise_is_no_slice(layout: str, reverse: bool) -> None:
    def run(xs: torch.Tensor, again: torch.Tensor) -> torch.Tensor:
        if layout == "batch first":
            xs = xs.transpose(0, 1)
        elif layout == "expanded":
            xs = xs[:, :1].expand(40, 2, 4)

        def step(h: torch.Tensor, each: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
            x, starts = each
            h = torch.where(starts, xs[-1 if reverse else 0], torch.tanh(0.5 * h + x))
            return h, h

        result: torch.Tensor = fxjacobi.scan(step, torch.zeros(2, 4), (xs, again), reverse=reverse)[1]

        return result

    never, once = torch.zeros(40, 2, 1, dtype=torch.bool), torch.zeros(40, 2, 1, dtype=torch.bool)
    once[20] = True
    xs = torch.randn(2, 40, 4) if layout == "batch first" else torch.randn(40, 2, 4)
    with torch.no_grad():
        compiled = fxjacobi.compile(run, measure=False)
        compiled(xs, never)
        for flags in (never, once):
            assert torch.equal(compiled(xs, flags), run(xs, flags))
            assert compiled.report.solved
    assert sum("scan" in n.name for n in compiled.stages["capture"].graph.nodes) == 1


def test_two_carries_with_the_same_first_value() -> None:
    def run(xs: torch.Tensor) -> torch.Tensor:
        def step(
            state: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor
        ) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
            h, c = state
            c = 0.5 * c + x
            h = torch.tanh(0.5 * h + c)
            return (h, c), h

        start = torch.zeros(2, 4)
        result: torch.Tensor = fxjacobi.scan(step, (start, start), xs)[1]
        return result

    with torch.no_grad():
        compiled = fxjacobi.compile(run, measure=False)
        for _ in range(3):
            xs = torch.randn(40, 2, 4)
            assert torch.equal(compiled(xs), run(xs))
        assert compiled.report.solved


def test_a_step_that_writes_to_its_carry_in_place() -> None:
    def run(xs: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        def step(h: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h.mul_(0.5).add_(x)
            return h, h.clone()

        result: torch.Tensor = fxjacobi.scan(step, start, xs)[1]

        return result

    with torch.no_grad():
        compiled = fxjacobi.compile(run, measure=False)
        for _ in range(3):
            xs, start = torch.randn(40, 2, 4), torch.randn(2, 4)
            mine, other = start.clone(), start.clone()
            assert torch.equal(compiled(xs, mine), run(xs, other))
            assert torch.equal(mine, other)
