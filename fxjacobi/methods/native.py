"""Gauss-Seidel in machine code: the steps in order, as one function (:mod:`fxjacobi.native`)."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from typing_extensions import override

from fxjacobi import native
from fxjacobi.batched_body import BatchedBody
from fxjacobi.constants import positions
from fxjacobi.graph import TensorSpec
from fxjacobi.lanes import FEWEST, cores
from fxjacobi.loops import Carried, Loop
from fxjacobi.methods.comparison import Comparison, compared
from fxjacobi.methods.frozen import apart
from fxjacobi.methods.method import Contract, Evaluated, Iterate, Method
from fxjacobi.methods.settle import ROUNDING

if TYPE_CHECKING:
    from fxjacobi.native.program import Program, Run
    from fxjacobi.system import States, System

__all__ = ["Native", "refusal", "refused_at_sight", "splits"]

_log = logging.getLogger(__name__)

_APART = 8
"""Once all steps of a call have held, a call looks at one in so many."""

_ROUNDED = 2.0**-12
"""Relative residual under which a value is the same in another order of rounding: the square root of float32's epsilon."""

_refusals: weakref.WeakKeyDictionary[Loop, str] = weakref.WeakKeyDictionary()


def refusal(system: System) -> str | None:
    """Return why the loop does not run in machine code, having tried; ``None`` where it does."""
    return refused_at_sight(system.loop) or (None if _program(system) is not None else _refusals[system.loop])


def splits(system: System) -> bool:
    """Whether cores may run samples of their own in machine code."""
    if refusal(system) is not None:
        return False
    found = _program(system)
    return found is not None and found[0].samples >= 2 * FEWEST


def _program(system: System) -> tuple[Program, list[torch.Tensor]] | None:
    """Return the loop's machine code and what it reads, or ``None`` where there is none, and remember why."""
    loop = system.loop
    if refused_at_sight(loop) is not None:
        return None
    from fxjacobi.native.emitter import NoMachineFormError
    from fxjacobi.native.program import prepared

    try:
        return prepared(system)
    except NoMachineFormError as error:
        _refusals[loop] = str(error)
        _log.info("a loop of %d steps stays as it is: %s", system.steps, error)
    except Exception as error:  # noqa: BLE001 - a fault of ours must not take the other ways of the loop away
        _refusals[loop] = f"writing it raised {type(error).__name__}: {error}"
        _log.warning("a loop of %d steps was not written as machine code", system.steps, exc_info=error)
    return None


def refused_at_sight(loop: Loop) -> str | None:
    """Return why the loop cannot run in machine code, as far as that shows without trying."""
    if loop in _refusals:
        return _refusals[loop]
    body = BatchedBody.of(loop)
    if body.device.type != "cpu":
        return "machine code is for the CPU"
    dtypes = {s.dtype for b in loop.bindings if isinstance(b, Carried)
              for s in [body.output_specs[b.output]] if isinstance(s, TensorSpec)}  # fmt: skip
    if not dtypes <= {torch.float32, torch.float64, torch.bool}:
        return f"a state of {', '.join(sorted(map(str, dtypes)))}"
    return native.missing()


@dataclass(frozen=True)
class Native(Method):
    """``s_t = h_t(s_{t-d})``, one ``t`` after another, in machine code written for the loop, and one sweep that checks it.

    It is the definition up to the order in which a matrix product sums, with no call between two operations, and its matrices
    stay in the processor's cache: what is left of a step's time is arithmetic. PyTorch's own operations evaluate every equation
    at what came out, until all have held in a call, and one in eight after that, others at each call. A second trajectory
    beside the first, disturbed at each step, measures how far rounding gets (:mod:`fxjacobi.native.disturbed`). Where that
    or a residual is more than the tolerance at any step, all of them run in the ordinary order.

    With ``lanes`` each of so many cores runs samples of its own, four at least, where no sample of the batch reads another's
    values.

    Raises:
        ValueError: The lanes are not positive.
    """

    keeps_bits: ClassVar[bool] = False

    lanes: int = 1

    def __post_init__(self) -> None:
        if self.lanes < 1:
            raise ValueError(f"at least 1 core runs the samples, not {self.lanes}")

    @override
    def applies(self, loop: Loop) -> bool:
        return refused_at_sight(loop) is None

    @override
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        return Iterate(states=guess)

    @override
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        found = _program(system)
        if found is None:  # an adjoint, say, which planning has not seen
            return replace(iterate, update=0.0, evaluated=_nothing(system, iterate.states))
        program, tensors = found
        with cores(self.lanes):
            run = program(system, tensors, self.lanes)
        at = _spots(system.steps, program.calls) if program.agreed and not system.others else None
        at = None if at is None or len(at) > system.rows_limit else at
        there = run.states if at is None else tuple(s.index_select(0, positions(at, s.device)) for s in run.states)
        outputs = system.evaluate(run.states) if at is None else system.evaluate_at(run.states, at)
        values = system.pick(outputs)
        against = compared(values, there, contract, samples=apart(system))
        program.agreed |= at is None and bool((against.holds & (against.relative <= _ROUNDED)).all())
        others = {o: outputs[o] for o in system.others}
        near = _near(run, _rounding(run, at, values, there), contract)
        # All or nothing: what a recurrence makes of an error later is known of the steps that were run alone.
        prefix = system.steps if bool(near.all()) and bool(against.holds.all()) else 0
        return replace(
            iterate, states=run.states, prefix=prefix, update=0.0,
            evaluated=Evaluated(at, values, others, against, near),
        )  # fmt: skip

    @override
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        return iterate.evaluated is not None  # another sweep would find the same


def _spots(steps: int, call: int) -> tuple[int, ...]:
    """Return the steps to look at in a call: others in each of :data:`_APART` calls."""
    return tuple(range(call % _APART, steps, _APART)) if steps >= _APART else tuple(range(steps))


def _nothing(system: System, states: States) -> Evaluated:
    """Return an evaluation by which no equation holds."""
    worst = torch.full((system.steps,), torch.inf, dtype=torch.float64)
    against = Comparison(worst, torch.zeros_like(worst), worst)
    return Evaluated(None, states, {}, against, torch.zeros(system.steps, dtype=torch.bool))


def _rounding(run: Run, at: tuple[int, ...] | None, values: States, there: States) -> float:
    """Return how much more a step rounds than the disturbance takes it to, one at least.

    It goes with a batched evaluation that differs by up to :data:`ROUNDING` epsilons of the largest element in half of the
    steps, as of cells with default or trained weights. Long sums of larger weights round by more.
    """
    most = 1.0
    for component, (value, state) in enumerate(zip(values, there, strict=True)):
        if not value.is_floating_point():
            continue
        large = run.large[:, component]
        large = large if at is None else large.index_select(0, positions(at, state.device))
        moved = (value - state).reshape(len(large), -1).abs().amax(1) / large
        usual = moved[torch.isfinite(moved)]
        if usual.numel():
            most = max(most, float(usual.median()) / (ROUNDING * torch.finfo(value.dtype).eps))
    return most


def _near(run: Run, rounding: float, contract: Contract) -> torch.Tensor:
    """Return at which steps what rounding may have come to is within the tolerance, (T,).

    Or within the rounding of a single step, where that is more.
    """
    from fxjacobi.native.disturbed import DISTURBANCE

    large = run.large.double()
    tolerance = contract.atol + contract.rtol * large
    far = run.far.double() * (rounding / DISTURBANCE)
    units = torch.where(far == 0, 0.0, far / tolerance)
    epsilons = torch.tensor([torch.finfo(s.dtype).eps if s.dtype.is_floating_point else 0.0 for s in run.states])
    most = torch.where(large > 0, (ROUNDING * epsilons * large / tolerance).clamp_min(1.0), 1.0)
    return (units <= most).all(1)  # false where it is no number
