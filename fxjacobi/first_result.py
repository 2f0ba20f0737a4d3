"""The first result of an emitted module, held against the recorded run, and what follows from it for its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi.blocks import last_solution, loop_of, method_of
from fxjacobi.device.step_graphs import StepGraphs
from fxjacobi.scripted_loop import ScriptedLoop, run_in_order, scripted_steps
from fxjacobi.timing import started
from fxjacobi.verify import equal, first_difference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from fxjacobi.capture import Capture
    from fxjacobi.options import Options
    from fxjacobi.recorded_run import RecordedRun

__all__ = ["demote", "difference", "put_in_order"]

_ACCUMULATED = 1000.0  # tolerances that errors of single steps may add up to in an output

_MANY_SWEEPS = 0.25  # share of the steps from which sweeps are timed against the steps in order


def difference(capture: Capture, values: Sequence[torch.Tensor], options: Options) -> Any:
    """Return what ``values`` have that the recorded results have not, for a message; ``None`` if nothing."""
    found = [v.detach() for v in values]
    for position, (value, wanted) in enumerate(zip(values, capture.results, strict=True)):
        if value.requires_grad != wanted.requires_grad:
            return f"output {position} requires_grad is {value.requires_grad}, ordinarily {wanted.requires_grad}"
    if options.exact:
        return first_difference(found, [r.detach() for r in capture.results])
    return _beyond_tolerance(capture, found, options)


def _beyond_tolerance(capture: Capture, found: Sequence[torch.Tensor], options: Options) -> str | None:
    """A gross difference: each step is within its tolerance, and a stable recurrence adds up a bounded number."""
    for position, (a, b) in enumerate(zip(found, capture.results, strict=True)):
        wanted = b.detach()
        if equal(a, wanted):
            continue
        if a.shape != wanted.shape or a.dtype != wanted.dtype or not (a.is_floating_point() or a.is_complex()):
            return f"output {position} differs in shape, dtype or in integers"
        scale = wanted[wanted.isfinite()].abs().max() if bool(wanted.isfinite().any()) else wanted.new_zeros(())
        bound = _ACCUMULATED * (options.atol + options.rtol * float(scale))
        unequal = (a != wanted) & ~(a.isnan() & wanted.isnan())
        error = float((a - wanted)[unequal].abs().max())
        if not error <= bound:
            return f"output {position} is off by {error:.3g}, more than {bound:.3g}"
    return None


def demote(module: fx.GraphModule, run: RecordedRun) -> list[str]:
    """Replace each block whose results differ from its loop's by the loop; return their names."""
    demoted: list[str] = []

    class _Compare(fx.Interpreter):
        def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            block = self.fetch_attr(target)
            loop = loop_of(block)
            if loop is None or loop is block:
                return super().call_module(target, args, kwargs)
            wanted = loop(*args, **kwargs)
            found = block(*args, **kwargs)
            same = all(
                equal(a.detach(), b.detach()) for a, b in zip(found, wanted, strict=True) if isinstance(b, torch.Tensor)
            )
            if not same:
                demoted.append(f"{target} ({method_of(block)})")
                loop.reason = f"its first result by {method_of(block)} differed from the ordinary run's"
                module.add_module(str(target), loop)
            return wanted

    operands = run.operands()
    with run.again():
        _Compare(module).run(*operands)
    return demoted


def put_in_order(module: fx.GraphModule, run: RecordedRun) -> bool:
    """Put the steps in order back where sweeps were many and running the steps is faster; return whether any were.

    A fixed point that was not reached, or an array of which each sweep settles a step or two, gains nothing.
    """
    if not any(_swept_long(block) for block in module.children()):
        return False
    replaced: list[str] = []

    class _Time(fx.Interpreter):
        def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            block = self.fetch_attr(target)
            clock = started()
            values = super().call_module(target, args, kwargs)
            solved_s = clock()
            loop, last = loop_of(block), last_solution(block)
            if loop is None or last is None or not _swept_long(block):
                return values
            run_in_order(loop, args)
            clock = started()
            values = run_in_order(loop, args)
            if clock() < solved_s:
                loop.reason = f"{last.sweeps} sweeps by {method_of(block)} took longer than {loop.trip_count} steps"
                module.add_module(str(target), ScriptedLoop(loop))
                replaced.append(str(target))
            return values

    operands = run.operands()
    with run.again():
        _Time(module).run(*operands)
    return bool(replaced)


def _swept_long(block: nn.Module) -> bool:
    loop, last = loop_of(block), last_solution(block)
    if loop is None or last is None or isinstance(block, (ScriptedLoop, StepGraphs)) or scripted_steps(loop) is None:
        return False
    return last.sweeps > _MANY_SWEEPS * loop.trip_count
