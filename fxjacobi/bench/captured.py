"""The recurrence that fxjacobi finds in a model, with the operands of one call: what solver benchmarks run on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import fxjacobi
from fxjacobi.blocks import loop_of
from fxjacobi.loops import Kind, Loop

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["recurrence_of"]


def recurrence_of(model: Callable[..., Any], *calls: tuple[Any, ...]) -> tuple[Loop, list[tuple[Any, ...]]]:
    """Return the longest recurrence of ``model`` and, for each call, the operands that it gets there.

    Args:
        model: Any callable.
        calls: The arguments of one call each, all of the same shapes.

    Raises:
        ValueError: No recurrence was found.
    """
    compiled = fxjacobi.compile(model, method="sequential", measure=False, strict=True)
    with torch.no_grad():
        compiled(*calls[0])
        stages = compiled.stages
        blocks = [b for b in stages[next(reversed(stages))].children() if _is_recurrence(b)] if stages else []
        if not blocks:
            raise ValueError(f"no recurrence was found: {compiled.plan.reason}")
        block = max(blocks, key=_steps)
        seen: list[tuple[Any, ...]] = []
        hook = block.register_forward_pre_hook(lambda _, operands: seen.append(operands))
        try:
            for args in calls:
                compiled(*args)
        finally:
            hook.remove()
    loop = loop_of(block)
    assert loop is not None
    if len(seen) != len(calls):
        raise ValueError(f"the recurrence was called {len(seen)} times: {compiled.report.reason}")
    return loop, seen


def _is_recurrence(module: torch.nn.Module) -> bool:
    loop = loop_of(module)
    return loop is not None and loop.kind is Kind.RECURRENCE


def _steps(module: torch.nn.Module) -> int:
    loop = loop_of(module)
    assert loop is not None
    return loop.trip_count
