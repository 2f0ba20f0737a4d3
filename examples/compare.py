"""What every example's `main` does: run a function ordinarily and compiled, check equality, print the times."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

import fxjacobi

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")


def timed(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> tuple[float, R]:
    """Seconds that one call takes, from random seed 0, and its result."""
    torch.manual_seed(0)
    start = time.perf_counter()
    result = function(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def compare(title: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run `function` ordinarily, compiling and compiled, each from random seed 0; print the plan and the times.

    Returns:
        The ordinary run's result.

    Raises:
        AssertionError: an element of the first or of the second compiled call's result differs from the ordinary run's.
    """
    ordinary, expected = timed(function, *args, **kwargs)
    compiled = fxjacobi.compile(function)
    first, recorded = timed(compiled, *args, **kwargs)
    fast, solved = timed(compiled, *args, **kwargs)
    for result in (recorded, solved):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    print(title)
    print(compiled.plan)
    if not compiled.report.solved:
        print(f"  ran the ordinary way: {compiled.report.reason}")
    for block in compiled.report.blocks:
        outcome = "" if block.certificate is None else block.certificate.value
        print(f"  {block.name}: {block.method}, {block.equations} equations, {block.sweeps} sweeps. {outcome}")
    print(f"equal: yes; ordinary {ordinary:.3f} s, first call {first:.3f} s, compiled {fast:.3f} s")
    print(f"{ordinary / fast:.2f} times the ordinary speed")
    return expected
