"""The public entry points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxjacobi.errors import PlanError
from fxjacobi.module import SolvedModule
from fxjacobi.options import Options
from fxjacobi.saved_plan import SavedPlan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fxjacobi.methods.guess import Guess
    from fxjacobi.plan import Plan

__all__ = ["compile", "explain"]


def compile(  # noqa: A001 - the name that torch's users expect
    model: Callable[..., Any],
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    method: str = "auto",
    strict: bool = False,
    measure: bool = True,
    budget_s: float = 2.0,
    memory_limit: int | None = None,
    plan: str | Path | None = None,
    warm_start: bool = False,
    guess: Guess | None = None,
) -> SolvedModule:
    """Return a module that computes what ``model`` computes, solving its sequential parts in parallel.

    The model's loops are read as a triangular system ``s_i = h_i(u, s_1 .. s_{i-1})``, ``i = 1 .. T``
    (arXiv 2002.03629, section 3), split into strongly connected blocks and solved by Gauss-Seidel across the blocks
    and Jacobi inside them. With the default tolerances every output element equals the ordinary run's on the same
    device, dtype, thread count and torch build, from the same random seed.

    Compilation happens at the first call for each signature of arguments; that call is the ordinary run, recorded.

    Args:
        model: A module, function or bound method.
        rtol: Relative tolerance at which an iterate may stop; 0 asks for equality.
        atol: Absolute tolerance, likewise.
        method: ``"auto"``, or the method that every recurrence must use.
        strict: Raise :class:`fxjacobi.CaptureError` where the model cannot be recorded, instead of one warning.
        measure: Keep the emitted module only where it is measured to be faster than the original. ``False`` keeps it
            always, to look at it or to test it.
        budget_s: Seconds that measuring may take for one signature.
        memory_limit: Bytes that a batched sweep may allocate.
        plan: A file written by ``compiled.save_plan(path)``: its decisions are followed instead of measuring anew.
        warm_start: Start each block's sweeps from the solution of the call before (streams, training steps). It holds one
            trajectory a block, and changes how many sweeps are needed, never the contract that the answer keeps.
        guess: Where sweeps start otherwise (:mod:`fxjacobi.methods.guess`): the values before the loop by default.

    Raises:
        TypeError: ``model`` is not callable, or an option has the wrong type.
        ValueError: An option's value is out of range.
        PlanError: ``plan`` was measured on another device or torch build, is damaged, or comes with a ``method``; at the
            first call, for another graph or contract.
    """
    saved = SavedPlan.load(plan) if plan is not None else None
    if saved is not None:
        warm_start, guess = warm_start or saved.warm_start, saved.start(guess)
    options = Options(rtol, atol, method, strict, measure, budget_s, memory_limit, saved, warm_start, guess)
    if not callable(model):
        raise TypeError(f"model must be callable, not {type(model).__name__}")
    if saved is not None and (saved.rtol, saved.atol) != (rtol, atol):
        raise PlanError(
            f"{plan} was measured with rtol={saved.rtol:g}, atol={saved.atol:g}, not with {rtol:g}, {atol:g}"
        )
    if saved is not None and method != "auto":
        raise PlanError(f"{plan} says which methods to use; method={method!r} would be ignored: pass one of them")
    if isinstance(model, SolvedModule):
        model = model._original
    return SolvedModule(model, options)


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """Run ``model`` once on the arguments, recorded, and return its plan, with refusals and reasons.

    Raises:
        TypeError: ``model`` is not callable.
    """
    compiled = compile(model)
    compiled(*args, **kwargs)
    return compiled.plan
