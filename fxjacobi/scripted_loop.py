"""A loop run in its ordinary order without Python between its operations."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxjacobi.certificate import Certificate, Solution
from fxjacobi.device.step_graphs import step_graphs
from fxjacobi.loops import Literal, Loop, Stacked
from fxjacobi.torchscript import NotScriptableError, ScriptedSteps, script_graph, script_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ScriptedLoop", "one_step", "run_in_order", "scripted", "scripted_steps", "stacking"]

_log = logging.getLogger(__name__)

_known: weakref.WeakKeyDictionary[Loop, dict[tuple[bool, int], ScriptedSteps | None]] = weakref.WeakKeyDictionary()


def scripted_steps(loop: Loop, *, in_place: bool = False, dim: int = 0) -> ScriptedSteps | None:
    """Return the loop's steps as one call, written once in the loop's lifetime; ``None`` where TorchScript cannot say it.

    Args:
        loop: The loop.
        in_place: Write the arrays that it carries in place: not for autograd.
        dim: Where stacked results hold the steps.
    """
    known, key = _known.setdefault(loop, {}), (in_place, dim)
    if key not in known:
        try:
            known[key] = script_loop(loop, in_place=in_place, dim=dim)
        except NotScriptableError as refusal:
            _log.info("a loop of %d steps stays in Python: %s", loop.trip_count, refusal)
            known[key] = None
    return known[key]


_bodies: weakref.WeakKeyDictionary[Loop, Callable[..., Sequence[Any]]] = weakref.WeakKeyDictionary()


def one_step(loop: Loop) -> Callable[..., Sequence[Any]]:
    """Return the loop's body as one call where TorchScript can say it, as it is where not. Not for autograd."""
    if loop not in _bodies:
        if any(isinstance(b, Literal) for b in loop.bindings):  # TorchScript would want one type of it
            return loop.body.forward
        try:
            _bodies[loop] = script_graph(loop.body)
        except NotScriptableError as refusal:
            _log.info("a step of a loop stays in Python: %s", refusal)
            _bodies[loop] = loop.body.forward
    return _bodies[loop]


_every: weakref.WeakKeyDictionary[Loop, dict[tuple[int, ...], Loop]] = weakref.WeakKeyDictionary()


def stacking(loop: Loop, outputs: tuple[int, ...]) -> Loop:
    """Return the loop with other results: these outputs of all steps. The same one each time."""
    known = _every.setdefault(loop, {})
    if outputs not in known:
        known[outputs] = Loop(loop.body, loop.trip_count, loop.bindings, [Stacked(o) for o in outputs])
    return known[outputs]


def run_in_order(loop: Loop, operands: Sequence[Any]) -> tuple[Any, ...]:
    """Return the loop's results, by Gauss-Seidel, the fastest way there is."""
    captured = step_graphs(loop)
    return scripted(loop, operands) if captured is None else captured(*operands)


def scripted(loop: Loop, operands: Sequence[Any]) -> tuple[Any, ...]:
    """Return the loop's results, scripted where TorchScript can say it."""
    gradients = torch.is_grad_enabled() and any(isinstance(o, torch.Tensor) and o.requires_grad for o in operands)
    steps = scripted_steps(loop, in_place=not gradients)
    results: tuple[Any, ...] = loop(*operands) if steps is None else steps(loop.align(operands))
    return results


class ScriptedLoop(nn.Module):
    """A loop's steps in order, in one call: the definition's own operations, hence its bits.

    ``s_t = h_t(s_{t-d})`` for ``t = 0 .. T-1``, one after another (Gauss-Seidel); see :mod:`fxjacobi.torchscript`.

    Args:
        loop: A loop that :func:`scripted_steps` takes.
    """

    method = "scripted"

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop
        self.last: Solution | None = None
        why = f"; {loop.reason}" if loop.reason else ""
        self.reason = f"in order, without Python between its operations{why}"

    @property
    def in_order(self) -> Loop:
        """The loop, for a loop around this one that is scripted as a whole."""
        return self.loop

    def forward(self, *operands: Any) -> tuple[Any, ...]:
        """Run the steps and return the loop's results."""
        self.last = Solution(self.loop.trip_count, Certificate.SEQUENTIAL, completed=self.loop.trip_count)
        return run_in_order(self.loop, operands)

    def extra_repr(self) -> str:
        """Show the trip count."""
        return f"trip_count={self.loop.trip_count}"
