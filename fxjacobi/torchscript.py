"""A graph, or a loop over one, as a TorchScript function: the same ATen calls in the same order, without Python between.

    for t in range(T):  outputs_t = body(bindings at t)

becomes one call; guards are looked at after it. The interpreter runs with its optimiser off, so each operation of the graph is exactly one call
of the same overload, and the values are the graph's own bit for bit. Calling an overload from Python costs 3-4 us,
from the interpreter about 1 us (measured, 2 cores, torch 2.13): for small steps that is most of the time.

What TorchScript cannot say is refused (:class:`NotScriptableError`), and the caller stays with Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.loops import Carried, Invariant, Loop, Scanned, Table
from fxjacobi.ops import guard_steps
from fxjacobi.script_text import NotScriptableError
from fxjacobi.script_writer import ScriptWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import fx

__all__ = ["NotScriptableError", "ScriptedSteps", "script_graph", "script_loop"]


def script_graph(module: fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
    """Return ``module``, whose placeholders and outputs are tensors, as one call that returns the tuple of its outputs.

    Raises:
        NotScriptableError: See the class.
    """
    writer = ScriptWriter()
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    arguments = [writer.parameter("Tensor") for _ in placeholders]
    outputs = writer.graph(module, arguments)
    found = [writer.tensor_of(o) for o in outputs]
    function, count = writer.finish(found), len(found)
    guards = writer.expected
    return lambda *values: _run(function, values, count, guards)


def script_loop(loop: Loop, *, in_place: bool = False, dim: int = 0) -> ScriptedSteps:
    """Return the loop's steps as one call.

    Args:
        loop: The loop.
        in_place: Write the arrays that it carries in place where only autograd could tell.
        dim: Where stacked results hold the steps.

    Raises:
        NotScriptableError: See the class.
    """
    writer = ScriptWriter(in_place=in_place)
    used = sorted({o for b in loop.bindings if not isinstance(b, Carried) for o in _operands_of(b)})
    names = {o: writer.parameter("Tensor") for o in used}
    start = writer.parameter("int")
    registers = [
        [writer.parameter("Tensor") for _ in range(b.distance)] if isinstance(b, Carried) else [] for b in loop.bindings
    ]
    results = writer.loop(loop, names, registers, start, dim)
    return ScriptedSteps(loop, writer.finish(results), tuple(used), writer.expected)


class ScriptedSteps:
    """The steps of a loop from any one on, in order, in one call.

    Args:
        loop: The loop.
        function: Its TorchScript function.
        used: The operands that the function takes.
        guards: What the stacks that the function returns after the results must hold.
    """

    def __init__(
        self, loop: Loop, function: Callable[..., Any], used: tuple[int, ...], guards: Sequence[tuple[Any, ...]] = ()
    ) -> None:
        self._carries = tuple(b for b in loop.bindings if isinstance(b, Carried))
        self._function = function
        self._used = used
        self._guards = guards
        self._steps = loop.trip_count
        self._count = len(loop.results)

    def __call__(self, operands: Sequence[Any]) -> tuple[Any, ...]:
        """Return the loop's results; ``operands`` are aligned (:meth:`fxjacobi.loops.Loop.align`)."""
        before = [[operands[o] for o in carry.init] for carry in self._carries]
        return self.resume(operands, 0, before)

    def resume(self, operands: Sequence[Any], start: int, before: Sequence[Sequence[torch.Tensor]]) -> tuple[Any, ...]:
        """Run steps ``start .. T-1``; a stacked result holds these only.

        Args:
            operands: The loop's operands, aligned. Those that only start a carry are not read.
            start: The first step.
            before: For each carry, in the order of the bindings, the values of the ``distance`` steps before ``start``,
                the oldest first; fewer where the loop has fewer steps.

        Raises:
            GuardFailed: A branch of the recorded run goes the other way at a step.
        """
        registers: list[torch.Tensor] = []
        for carry, values in zip(self._carries, before, strict=True):
            known = list(values[: carry.distance])
            registers += known + [known[-1]] * (carry.distance - len(known))
        guards = [g[start * len(g) // self._steps :] for g in self._guards]
        return _run(self._function, [*(operands[o] for o in self._used), start, *registers], self._count, guards)


def _run(
    function: Callable[..., Any], values: Sequence[Any], count: int, guards: Sequence[tuple[Any, ...]]
) -> tuple[Any, ...]:
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        found = function(*values)
    for looked_at, expected in zip(found[count:], guards, strict=True):
        guard_steps(looked_at, expected)
    return tuple(found[:count])


def _operands_of(binding: Any) -> tuple[int, ...]:
    match binding:
        case Carried(_, _, init):
            return init
        case Scanned(operand, _, _) | Invariant(operand):
            return (operand,)
        case Table(operands):
            return operands
    return ()
