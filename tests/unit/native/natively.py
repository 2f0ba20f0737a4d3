"""What tests of machine code share: a function's value as the state of a loop, computed by PyTorch and by machine code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxjacobi.loops import Binding, Carried, Invariant, Loop, Stacked
from fxjacobi.lowered import lowered
from fxjacobi.native.program import Program, prepared
from fxjacobi.system import System

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["assert_rounded", "compiled", "computed"]


def compiled(
    function: Callable[..., torch.Tensor], *tensors: torch.Tensor, steady: bool | Sequence[bool] = False
) -> tuple[System, Program, list[torch.Tensor]]:
    """Return a loop of two steps whose state is ``function`` of tensors, as machine code.

    With ``steady`` these (or some of them) are the loop's invariants; without, states that it carries on, as machine code
    computes them.
    """
    stays = [steady] * len(tensors) if isinstance(steady, bool) else list(steady)
    value = function(*tensors)

    def step(_: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (function(*given), *(g.clone() for g, s in zip(given, stays, strict=True) if not s))

    body = lowered(step, torch.zeros_like(value), *tensors)
    rest: list[Binding] = []
    for i, stay in enumerate(stays):
        carried = sum(isinstance(b, Carried) for b in rest)
        rest.append(Invariant(1 + i) if stay else Carried(1 + carried, 1, (1 + i,)))
    loop = Loop(body, 2, [Carried(0, 1, (0,)), *rest], [Stacked(0)])
    system = System(loop, (torch.zeros_like(value), *tensors))
    return system, *prepared(system)


def computed(
    function: Callable[..., torch.Tensor], *tensors: torch.Tensor, steady: bool = False, lanes: int = 1
) -> torch.Tensor:
    """Return ``function`` of tensors as machine code computes it, at the first of the loop's steps."""
    system, program, read = compiled(function, *tensors, steady=steady)
    return program(system, read, lanes).states[0][0]


def assert_rounded(found: torch.Tensor, wanted: torch.Tensor, epsilons: float = 16.0) -> None:
    """Assert that values agree to some epsilons of the largest finite one; what is not finite must be equal."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    if not wanted.is_floating_point():
        assert torch.equal(found, wanted)
        return
    finite = wanted[torch.isfinite(wanted)].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    bound = epsilons * torch.finfo(wanted.dtype).eps * scale + torch.finfo(wanted.dtype).tiny
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=bound, equal_nan=True)
