"""The one driver loop of all methods: sweep, check against the sequential definition, complete in order if need be."""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.batched_body import BatchedBody
from fxjacobi.certificate import Certificate, Solution
from fxjacobi.constants import positions
from fxjacobi.footprint import StateSize
from fxjacobi.lanes import cores
from fxjacobi.methods.affine import Affine
from fxjacobi.methods.comparison import Comparison, agree, compared
from fxjacobi.methods.frozen import Samples, apart
from fxjacobi.methods.guess import Base, Guess
from fxjacobi.methods.jacobian import batch_size
from fxjacobi.methods.method import Contract, Iterate, Method
from fxjacobi.methods.native import Native
from fxjacobi.methods.sequential import Sequential
from fxjacobi.methods.settle import leading
from fxjacobi.system import States, System

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.batched_body import Batch
    from fxjacobi.loops import Loop
    from fxjacobi.methods.settle import PassedOn

__all__ = ["Solved", "TrialError", "lawful", "solve", "solve_system"]

logger = logging.getLogger(__name__)


class TrialError(Exception):
    """A trial (:attr:`Contract.trial_until`) has shown that the method does not solve this in time; not for users."""


@dataclass(frozen=True, slots=True)
class Solved:
    """A solved trajectory, the other stacked outputs that are results (by output index), and the record."""

    states: States
    others: dict[int, torch.Tensor]
    solution: Solution


def lawful(method: Method, loop: Loop, contract: Contract) -> bool:
    """Whether ``method`` may solve ``loop`` under ``contract``; where not, the driver runs the loop in order."""
    if isinstance(method, Sequential):
        return True
    if contract.exact and not (method.keeps_bits and contract.exactly_batched):
        return False
    body = BatchedBody.of(loop)
    return body.uniform and body.pure and method.applies(loop)


def solve(
    loop: Loop,
    operands: Sequence[Any],
    method: Method,
    contract: Contract,
    *,
    guess: Guess | None = None,
    batch: Batch | None = None,
    memory_limit: int | None = None,
) -> tuple[tuple[Any, ...], Solution]:
    """Return the loop's results, solved by ``method``, and how that went.

    Exact contract: ``s_t = h_t(s_{t-d})`` bit for bit. Tolerance: each equation's residual within it, or at the level
    of rounding. What the sweeps do not reach within their bound is run in order, from the last step that is right.

    Args:
        loop: A recurrence whose body neither draws random numbers nor holds guards, or it runs in order.
        operands: The loop's operands.
        method: A method; where it is not lawful for this loop and contract, the loop runs in order.
        contract: Tolerances and bounds.
        guess: Where the sweeps start; the values before the loop by default.
        batch: An evaluator of many steps at once that keeps bits, for the exact contract.
        memory_limit: Bytes that one batched evaluation may allocate.
    """
    if not lawful(method, loop, contract):
        method = Sequential()
    if isinstance(method, Sequential):
        with torch.no_grad():
            return loop(*operands), Solution(0, Certificate.SEQUENTIAL, 0.0, (), loop.trip_count)
    system = System(loop, operands, batch=batch, memory_limit=memory_limit)
    solved = solve_system(system, method, contract, guess if guess is not None else Base())
    return system.results(solved.states, solved.others), solved.solution


@torch.no_grad()
def solve_system(system: System, method: Method, contract: Contract, guess: Guess) -> Solved:
    """:func:`solve` for a system that is there already, with a method that is lawful for it."""
    with cores(method.cores):
        return _solve_system(system, method, contract, guess)


def _solve_system(system: System, method: Method, contract: Contract, guess: Guess) -> Solved:
    swept = _swept_in_windows(system, method, contract, guess)
    if contract.trial_until is not None and not method.done(swept.iterate, contract):
        raise TrialError(f"given up after {len(swept.prefixes)} sweeps: they do not converge")
    if not swept.prefixes:
        solved = _complete(system, swept.iterate.states, {}, 0, Solution(0, Certificate.SEQUENTIAL))
    else:
        solved = _checked(system, method, swept.iterate, contract, swept.prefixes)
    window = min(swept.window, system.rows_limit)
    some = min(swept.active, default=0) < max(swept.active, default=0)
    return replace(
        solved,
        solution=replace(
            solved.solution,
            window=window if window < system.steps else None,
            active=swept.active if some else (),
        ),
    )


@dataclass(frozen=True, slots=True)
class _Swept:
    """Where sweeps came to, the prefix after each and the samples that each ran, and the steps solved together."""

    iterate: Iterate
    prefixes: tuple[int, ...]
    active: tuple[int, ...]
    window: int


def _swept_in_windows(system: System, method: Method, contract: Contract, guess: Guess) -> _Swept:
    """Sweep all steps together, or window after window where memory does not allow it."""
    window = _window(system, method)
    states = guess.states(system)
    if window < system.steps:
        states = _own(states)
    start, prefixes, active = 0, list[int](), list[int]()
    carried: PassedOn = ()
    while True:
        stop = min(system.steps, start + window)
        part = system if stop - start == system.steps else system.between(start, stop, states)
        some = part.base() if isinstance(guess, Base) else tuple(s[start:stop] for s in states)
        left = None if contract.max_sweeps is None else max(0, contract.max_sweeps - len(prefixes))
        try:
            swept = _swept(part, method, replace(contract, max_sweeps=left), some, carried)
        except torch.OutOfMemoryError:
            if stop - start == 1:
                logger.info("%s: one step does not fit in memory; completing in order", method.name)
                return _Swept(Iterate(states, start), (*prefixes, start), tuple(active), 1)
            window, states = (stop - start + 1) // 2, _own(states)
            logger.info("%s: %d steps do not fit in memory; going on with %d", method.name, stop - start, window)
            continue
        if part is system:
            return swept
        iterate = swept.iterate
        prefixes += [start + p for p in swept.prefixes]
        active += swept.active
        if part.rows_limit < stop - start:
            system.rows_limit = min(system.rows_limit, part.rows_limit)
        for whole, piece in zip(states, iterate.states, strict=True):
            whole[start:stop] = piece
        if not method.done(iterate, contract):
            return _Swept(Iterate(states, start + iterate.prefix), tuple(prefixes), tuple(active), window)
        if stop == system.steps:
            return _Swept(Iterate(states, stop, 0.0), tuple(prefixes), tuple(active), window)
        # What is left of the window's errors goes on into the next.
        carried = iterate.carried if iterate.prefix == part.steps else ((iterate.update, 0.0),)
        start = stop


def _own(states: States) -> States:
    return tuple(s.clone(memory_format=torch.contiguous_format) for s in states)


def _window(system: System, method: Method) -> int:
    """Return how many steps the method may solve together within the memory limit, one at least."""
    if system.memory_limit is None or method.bytes_per_step(system.loop, StateSize.of(system.loop, 1)) == 0:
        return system.steps
    own = method.bytes_per_step(system.loop, StateSize.of(system.loop, batch_size(system)))
    return max(1, min(system.steps, system.memory_limit // own))


def _swept(system: System, method: Method, contract: Contract, states: States, carried: PassedOn = ()) -> _Swept:
    """Sweep from ``states`` until ``method`` is done, its bound is reached, or it gets nowhere."""
    bound = system.steps if contract.max_sweeps is None else min(contract.max_sweeps, system.steps)
    if isinstance(method, Affine):
        bound = max(bound, 1)
    samples = Samples.of(system, method, contract)
    iterate = replace(method.init(system, states, contract), carried=carried)
    trace = _Trace(contract.patience)
    while not method.done(iterate, contract) and len(trace.prefixes) < bound and not trace.stalled:
        if contract.trial_until is not None and time.perf_counter() > contract.trial_until:
            raise TrialError(f"given up after {len(trace.prefixes)} sweeps: it takes too long")
        iterate = samples.step(method, iterate) if samples is not None else method.step(system, iterate, contract)
        trace.add(iterate)
    prefixes = tuple(trace.prefixes)
    if samples is None:
        return _Swept(iterate, prefixes, (), system.steps)
    return _Swept(samples.thawed(iterate), prefixes, tuple(samples.counts), system.steps)


class _Trace:
    """The sweeps so far, and whether they still get anywhere."""

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.prefixes: list[int] = []
        self.stalled = False
        self._best = math.inf
        self._since = 0
        self._from = 0
        self._stop: int | None = None

    def add(self, iterate: Iterate) -> None:
        self.prefixes.append(iterate.prefix)
        self._since += 1
        if iterate.update <= self._best / 2 or iterate.stop != self._stop:
            self._stop = iterate.stop
            self._best, self._since, self._from = iterate.update, 0, iterate.prefix
        elif self.patience is not None and self._since >= self.patience:
            # A sweep that makes fewer than two steps final is worth less than running these steps in order.
            self.stalled = iterate.prefix - self._from <= 2 * self._since
            self._since, self._from = 0, iterate.prefix


def _checked(system: System, method: Method, iterate: Iterate, contract: Contract, prefixes: tuple[int, ...]) -> Solved:
    """Hold the iterate against ``s_t = h_t(s_{t-d})``; complete in order from where it fails."""
    states = iterate.states
    finished = method.done(iterate, contract)
    sweeps = len(prefixes)
    if contract.exact:
        outputs = system.evaluate(states) if system.others else ()
        others = {o: outputs[o] for o in system.others}
        prefix = iterate.prefix
        if finished and prefix == system.steps:
            certificate = Certificate.EXACT_PREFIX if sweeps == system.steps else Certificate.REPEATED
            return Solved(states, others, Solution(sweeps, certificate, 0.0, prefixes))
        return _complete(system, states, others, prefix, Solution(sweeps, Certificate.FELL_BACK, 0.0, prefixes))
    looked = _residuals(system, iterate, contract)
    holds, others = looked.holds(system.steps), looked.others
    if finished and bool(holds.all()) and _agrees_with_body(system, states, looked, system.steps):
        certificate = {Affine: Certificate.SCANNED, Native: Certificate.IN_MACHINE_CODE}.get(
            type(method), Certificate.RESIDUAL
        )
        return Solved(states, others, Solution(sweeps, certificate, looked.residual(system.steps), prefixes))
    prefix = min(iterate.prefix, leading(holds))
    if not _agrees_with_body(system, states, looked, prefix):
        prefix = 0
    logger.info("%s: completing in order from step %d of %d", method.name, prefix, system.steps)
    record = Solution(sweeps, Certificate.FELL_BACK, looked.residual(prefix), prefixes)
    return _complete(system, states, others, prefix, record)


@dataclass(frozen=True, slots=True)
class _Residuals:
    """``h`` of a trajectory, as far as it had to be evaluated, beside the trajectory.

    Args:
        at: The steps whose equations were looked at, ascending; ``None``: all. At others ``h_t(s) = s_t`` as evaluated.
        values: ``h`` at these steps.
        others: The body's outputs that are results and no state, (T, ...).
        against: How far the trajectory is from ``values`` at these steps.
        near: Which steps are near the answer, as far as the method knows otherwise, (T,); ``None``: all.
    """

    at: tuple[int, ...] | None
    values: States
    others: dict[int, torch.Tensor]
    against: Comparison
    near: torch.Tensor | None = None

    def holds(self, steps: int) -> torch.Tensor:
        """Return for each step whether its equation holds, (T,)."""
        holds = self.against.holds
        if self.at is not None:
            holds = torch.ones(steps, dtype=torch.bool)
            holds[positions(self.at, holds.device)] = self.against.holds
        return holds if self.near is None else holds & self.near

    def residual(self, stop: int) -> float:
        """Return the largest ``max |h_t(s) - s_t| / max |h_t(s)|`` over the steps before ``stop``."""
        count = stop if self.at is None else bisect_left(self.at, stop)
        return float(self.against.relative[:count].amax()) if count else 0.0

    def batched(self, states: States, steps: Sequence[int]) -> States:
        """Return ``h`` of the trajectory ``states`` at some steps, as it was evaluated."""
        if self.at is None:
            return tuple(v.index_select(0, positions(tuple(steps), v.device)) for v in self.values)
        place = {step: row for row, step in enumerate(self.at)}
        rows = [
            [(v[place[t]] if t in place else s[t]) for t in steps] for v, s in zip(self.values, states, strict=True)
        ]
        return tuple(torch.stack(column) for column in rows)


def _residuals(system: System, iterate: Iterate, contract: Contract) -> _Residuals:
    """Evaluate the equations; one that the last sweep evaluated at the iterate's own values is not evaluated again."""
    states, at, known = iterate.states, iterate.open, iterate.evaluated
    if known is not None:
        return _Residuals(known.at, known.values, known.others, known.against, known.near)
    if at is None or iterate.others is None or len(at) == system.steps:
        outputs = system.evaluate(states)
        values = system.pick(outputs)
        return _Residuals(
            None,
            values,
            {o: outputs[o] for o in system.others},
            compared(values, states, contract, samples=apart(system)),
        )
    outputs = system.evaluate_at(states, at)
    index = positions(at, states[0].device)
    found = system.pick(outputs)
    others = {o: v.index_put((index,), outputs[o]) for o, v in iterate.others.items()}
    there = tuple(s.index_select(0, index) for s in states)
    return _Residuals(at, found, others, compared(found, there, contract, samples=apart(system)))


def _complete(system: System, states: States, others: dict[int, torch.Tensor], prefix: int, record: Solution) -> Solved:
    states, others = system.complete(states, others, prefix)
    residual = record.residual if record.residual is not None else 0.0
    solution = Solution(record.sweeps, record.certificate, residual, record.prefixes, system.steps - prefix)
    return Solved(states, others, solution)


def _agrees_with_body(system: System, states: States, looked: _Residuals, stop: int) -> bool:
    """Whether the body itself, run on single steps, gives what batching gave: at the first, middle and last before ``stop``."""
    # Ways of batching are compared when they are chosen; once a whole call has agreed too, its last step is looked at.
    steps = sorted(({stop - 1} if system.body.agreed else {0, stop // 2, stop - 1}) if stop else ())
    if not steps:
        return True
    single = [system.pick(system.alone(states, step)) for step in steps]
    alone = tuple(torch.stack(column) for column in zip(*single, strict=True))
    batched = looked.batched(states, steps)
    epsilons = [torch.finfo(v.dtype).eps for v in alone if v.is_floating_point() or v.is_complex()]
    # Another order of rounding, with the cancellation that a state of several tensors may hold.
    if not agree(alone, batched, math.sqrt(max(epsilons, default=0.0))):
        logger.warning("evaluating many steps at once does not give what the body gives; running in order")
        return False
    system.body.agreed |= stop == system.steps
    return True
