"""Comparing results element by element, and checking a compiled module against its original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi import bits
from fxjacobi.errors import ExactnessError
from fxjacobi.trees import split

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxjacobi.report import Report

__all__ = ["Verification", "equal", "first_difference", "verify"]


def equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether dtype, shape and device agree and every element is equal (IEEE ``==``; NaN matches NaN)."""
    return bits.first_difference(found, wanted) is None


def first_difference(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> str | None:
    """Say which of two lists' tensors differ first, where, and by how many ULPs; ``None`` where all are equal."""
    for position, (a, b) in enumerate(zip(found, wanted, strict=True)):
        difference = bits.first_difference(a, b)
        if difference is not None:
            return f"output {position}: {difference}"
    return None


@dataclass(frozen=True)
class Verification:
    """Result of :func:`verify`: how many tensors and elements were compared, and what the solved call did."""

    tensors: int
    elements: int
    report: Report


def verify(model: Callable[..., Any], *args: Any, calls: int = 2, **kwargs: Any) -> Verification:
    """Run ``model`` and its compiled form from the same random state and compare every element.

    Args:
        model: Any callable that :func:`fxjacobi.compile` takes. It should not change its own state or arguments;
            what it changes is changed once for each run.
        *args: Its arguments.
        calls: How many calls of the compiled module to compare (the first is the recorded ordinary run).
        **kwargs: Its keyword arguments.

    Raises:
        ExactnessError: At the first output element that differs.
    """
    from fxjacobi.api import compile as compile_  # the API imports this module

    compiled = compile_(model)
    tensors = elements = 0
    for call in range(calls):
        state = torch.get_rng_state()
        wanted_value = model(*args, **kwargs)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        found_value = compiled(*args, **kwargs)
        if not torch.equal(after, torch.get_rng_state()):
            raise ExactnessError(f"call {call}: the random state differs after the call")
        found_skeleton, found = split(found_value)
        wanted_skeleton, wanted = split(wanted_value)
        if len(found) != len(wanted):
            raise ExactnessError(f"call {call}: {found_skeleton} instead of {wanted_skeleton}")
        difference = first_difference(found, wanted)
        if difference is not None:
            blocks = ", ".join(f"{b.name} ({b.method})" for b in compiled.report.blocks) or "no block"
            raise ExactnessError(f"call {call}: {difference}; solved by {blocks}")
        tensors, elements = tensors + len(found), elements + sum(t.numel() for t in found)
    return Verification(tensors, elements, compiled.report)
