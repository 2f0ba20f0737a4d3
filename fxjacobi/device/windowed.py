"""Jacobi and GS-Jacobi on a device: a sweep over a window of steps, and where the window goes next, are one captured graph.

    s_t <- h_t(s_{t-d})  for prefix <= t < stop;    prefix' = min(stop, first t whose update is more than rounding + d)
    stop' = min(T, prefix' + W)  once half of the window is final

(:class:`fxjacobi.methods.windowed.Windowed`, :class:`fxjacobi.methods.jacobi.Jacobi`; arXiv 2002.03629, Algorithm 1 and
section 4.2). Prefix and window are tensors; a graph always evaluates ``W`` steps, and steps before the prefix keep their
values. How a solve runs is in :mod:`fxjacobi.device.solve_form`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from fxjacobi.device.norms import distance, leading_count
from fxjacobi.device.runner import Refused
from fxjacobi.device.solve_form import Progress, SolveForm, SolveSession
from fxjacobi.loops import Invariant, Literal
from fxjacobi.methods.settle import PassedOn, distances_of, errors_along, floors, observed_gains
from fxjacobi.methods.windowed import Windowed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.certificate import Solution
    from fxjacobi.device.form import Session
    from fxjacobi.device.operands import StaticOperands
    from fxjacobi.device.runner import GraphRunner
    from fxjacobi.solved_loop import SolvedLoop

__all__ = ["WindowedForm"]


class WindowedForm(SolveForm):
    """See the module's docstring; for loops solved by ``Windowed`` or ``Jacobi``."""

    def __init__(self, solved: SolvedLoop, runner: GraphRunner, device: torch.device) -> None:
        super().__init__(solved, runner, device)
        steps, method = self.loop.trip_count, solved.method
        self.window = min(method.window, steps) if isinstance(method, Windowed) else steps
        self.hop = self.window // 2 if isinstance(method, Windowed) and method.sliding else 0
        varying = any(isinstance(b, Literal) and any(v != b.values[0] for v in b.values) for b in self.loop.bindings)
        if self.refused is None and varying and self.window < steps:
            self.refused = Refused("its steps hold Python values of their own, so a window cannot move on the device")

    @override
    def build(self, operands: StaticOperands) -> Session | Refused:
        session = _WindowedSession(self, operands)
        return session.capture() or session


class _WindowedSession(SolveSession):
    def __init__(self, form: WindowedForm, operands: StaticOperands) -> None:
        super().__init__(form, operands)
        self.window, self.hop = form.window, form.hop
        self.states = [torch.empty_like(s, memory_format=torch.contiguous_format) for s in self.system.base()]
        self.inner = torch.arange(self.window, device=form.device)
        self.prefix = torch.zeros((), dtype=torch.int64, device=form.device)
        self.stop = torch.zeros((), dtype=torch.int64, device=form.device)
        self.inputs: tuple[Any, ...] = ()
        self.reader = form.runner.reader(2 + 2 * self.window, torch.float64, form.device)

    @override
    def begin_program(self) -> Sequence[torch.Tensor]:
        system = self.system = self.make_system()
        self.inputs = tuple(system.fixed(slice(None)))
        for buffer, base in zip(self.states, system.base(), strict=True):
            buffer.copy_(base)
        self.prefix.zero_()
        self.stop.fill_(self.window)
        return [self.stop.clone()]

    @override
    def sweep_program(self) -> Sequence[torch.Tensor]:
        system, contract = self.system, self.contract
        rows = self.inner + (self.stop - self.window)
        outputs = system.batch(self._arguments(rows), self.window)
        raw = system.pick(outputs)
        old = tuple(state.index_select(0, rows) for state in self.states)
        moved, floor = distance(raw, old, contract), floors(raw, contract)
        final = (moved <= floor) | (rows < self.prefix)
        prefix = torch.minimum(self.stop, rows[0] + leading_count(final) + system.nearest)
        base = system.base()
        for component, (state, new, before) in enumerate(zip(self.states, raw, old, strict=True)):
            shape = (-1, *[1] * (new.dim() - 1))
            guess = (rows >= prefix).reshape(shape) & ~torch.isfinite(new)
            value = torch.where(guess, base[component][: self.window], new)
            state.index_copy_(0, rows, torch.where((rows >= self.prefix).reshape(shape), value, before))
        numbers = torch.cat([torch.stack([self.stop, prefix]).double(), moved, floor])
        moves = self.stop - prefix <= self.hop
        self.stop.copy_(torch.where(moves, torch.clamp(prefix + self.window, max=self.total), self.stop))
        self.prefix.copy_(prefix)
        return [numbers, *self.states]

    def _arguments(self, rows: torch.Tensor) -> list[Any]:
        system = self.system
        arguments: list[Any] = []
        for binding, value in zip(system.loop.bindings, self.inputs, strict=True):
            if value is None or isinstance(binding, Invariant):
                arguments.append(value)
            elif isinstance(binding, Literal):
                arguments.append(value[: self.window])
            else:
                arguments.append(value.index_select(0, rows))
        for carry in system.carries:
            read = self.states[carry.component].index_select(0, torch.clamp(rows - carry.distance, min=0))
            before = carry.before.index_select(0, torch.clamp(rows, max=carry.depth - 1))
            outside = (rows < carry.distance).reshape(-1, *[1] * (read.dim() - 1))
            arguments[carry.placeholder] = torch.where(outside, before, read)
        return arguments

    @override
    def solve(self) -> tuple[tuple[Any, ...], Solution] | None:
        return self.swept(_Progress(self), self.total)


class _Progress(Progress):
    """The method's own decision (:func:`fxjacobi.methods.sweep.sweep`), from the numbers of each sweep."""

    def __init__(self, session: _WindowedSession) -> None:
        self._session = session
        self._updates = torch.zeros(session.total, dtype=torch.float64)
        self._gains = torch.full((session.total,), math.inf, dtype=torch.float64)
        self._distances = distances_of(session.system)
        self._prefix = self._seen = 0
        self._best, self._since, self._from = math.inf, 0, 0
        self._carried: PassedOn = ()
        self.prefixes = []
        self.done = self.stalled = False

    @override
    def add(self, numbers: Sequence[float]) -> None:
        """Take the updates of one sweep in."""
        total, window = self._session.total, self._session.window
        stop, prefix = int(numbers[0]), int(numbers[1])
        values = torch.tensor(numbers[2:], dtype=torch.float64)
        start, skipped = self._prefix, self._prefix - (stop - window)
        moved, floor = values[skipped:window], values[window + skipped :]
        updates, every = torch.zeros_like(self._updates), torch.zeros_like(self._updates)
        updates[start:stop], every[start:stop] = moved, floor
        self._gains = observed_gains(updates, self._updates, self._gains, every, self._distances)
        self._gains[min(self._seen, stop) :] = math.inf
        update = float(moved.amax())
        whole = update <= 1.0 and stop == total
        found = errors_along(
            moved, self._gains[start:stop], floor, self._distances, self._carried, share=1.0, whole=whole
        )
        if whole:
            update = max(update, found.after)
        self._carried = found.carried
        assert prefix >= min(stop, start + found.final)
        # The device takes steps that moved within rounding for final; where these add up, the driver solves it anew.
        drifted = prefix > start + found.final
        if prefix == total:
            update = 0.0
        elif stop < total:
            update = max(update, 1.0 + 1e-9)  # the steps behind the window are not solved yet
        self._watch(update, prefix, moved_on=stop != self._seen)
        self._updates, self._prefix, self._seen = updates, prefix, stop
        self.prefixes.append(prefix)
        self.done = update <= 1.0 and not drifted
        self.stalled |= drifted

    def _watch(self, update: float, prefix: int, *, moved_on: bool) -> None:
        """Give up where sweeps make fewer than two steps final, as the driver does."""
        patience = self._session.contract.patience
        self._since += 1
        if update <= self._best / 2 or moved_on:
            self._best, self._since, self._from = update, 0, prefix
        elif patience is not None and self._since >= patience:
            self.stalled |= prefix - self._from <= 2 * self._since
            self._since, self._from = 0, prefix
