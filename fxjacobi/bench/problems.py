"""The recurrences that solver benchmarks share: cells and a diffusion sampler, as fxjacobi found them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.bench.captured import recurrence_of
from fxjacobi.bench.cells import CellCase
from fxjacobi.bench.example_models import example
from fxjacobi.methods.anderson import Anderson
from fxjacobi.methods.chunked import Chunked
from fxjacobi.methods.jacobi import Jacobi
from fxjacobi.methods.newton import Newton
from fxjacobi.methods.picard import Picard
from fxjacobi.methods.quasi_newton import QuasiNewton
from fxjacobi.methods.windowed import Windowed
from fxjacobi.system import System

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fxjacobi.bench.benchmark import Settings
    from fxjacobi.loops import Loop
    from fxjacobi.methods.method import Method
    from fxjacobi.system import States

__all__ = ["Problem", "label", "problems", "trajectory"]


_SURNAMES = (Anderson, Jacobi, Newton, Picard)


@dataclass(frozen=True)
class Problem:
    """A recurrence on one input, and on another one close by.

    Args:
        name: What its rows are called.
        loop: The recurrence.
        operands: Of the call that is solved.
        near: Of a call on an input that differs by one percent of noise.
    """

    name: str
    loop: Loop
    operands: tuple[Any, ...]
    near: tuple[Any, ...]


def label(method: Method) -> str:
    """Return a method's name as tables and legends show it: with its chunk or window, without its other options."""
    match method:
        case Chunked(chunk):
            return f"chunked, {chunk} steps"
        case Windowed(window):
            return f"windowed, {window} steps"
        case QuasiNewton():
            return "quasi-Newton"
        case _:
            return (
                type(method).__name__.capitalize() if isinstance(method, _SURNAMES) else type(method).__name__.lower()
            )


def trajectory(problem: Problem, operands: tuple[Any, ...] | None = None, *, double: bool = False) -> States:
    """Return every state of the loop, run in order; in float64 where ``double`` says so."""
    values = problem.operands if operands is None else operands
    if double:
        values = tuple(v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values)
    system = System(problem.loop, values)
    return system.complete(system.base(), {}, 0)[0]


def problems(settings: Settings) -> Iterator[Problem]:
    """Yield a GRU with default and with trained weights, and DDIM with a small denoiser."""
    steps, hidden, size = (64, 16, 8) if settings.quick else (1024, 128, 28)
    cases = [CellCase("GRU", "default", steps, 1, hidden), CellCase("GRU", "pixels", steps, 1)]
    cases += [] if settings.quick else [CellCase("LSTM", "rows", steps, 1)]
    for case in cases:
        loop = case.loop(settings)
        yield _problem(case.name, settings, loop, (), case.inputs(settings))
    ddim = example("ddim")
    model = (ddim.small_digits_model() if settings.quick else ddim.digits_model()).to(settings.device)
    noise = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(settings.seed)).to(settings.device)
    yield _problem(f"DDIM, 100 steps, {size}x{size}", settings, ddim.sample, (model,), noise)


def _problem(
    name: str, settings: Settings, run: Callable[..., Any], first: tuple[Any, ...], x: torch.Tensor
) -> Problem:
    generator = torch.Generator().manual_seed(settings.seed + 100)
    near = x.clone().add_(0.01 * torch.randn(x.shape, generator=generator).to(x))  # its strides too: one signature
    loop, (operands, around) = recurrence_of(run, (*first, x), (*first, near))
    return Problem(name, loop, operands, around)
