"""``fxjacobi.scan`` inside a compiled function: recorded as one rolled loop, equal to the eager scan."""

from __future__ import annotations

from typing import Any

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
