"""One compiled form of a callable, for one signature of its arguments and one state of its Python values."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.blocks import last_solution, loop_of, method_of, plan_of_now
from fxjacobi.capture import AttributeEffect, Capture, StateInput, ViewOfWritten
from fxjacobi.errors import GuardFailed, GuessError
from fxjacobi.generators import RandomState
from fxjacobi.report import BlockReport, Report
from fxjacobi.trees import join

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import fx

    from fxjacobi.methods.method import Method
    from fxjacobi.plan import Plan

__all__ = ["MAX_GUARD_FAILURES", "Specialisation"]

_log = logging.getLogger(__name__)

MAX_GUARD_FAILURES = 8
"""Failed guards after which a specialisation is given up, if at most as many calls have succeeded."""

_LOOK_EVERY = 16


@dataclass
class Specialisation:
    """See the module's docstring. ``module`` is ``None`` where calls run the original callable.

    Attributes:
        original: The user's callable.
        capture: Its recorded run, or ``None`` where recording was refused.
        module: The emitted module.
        plan: What it does and why.
        stages: The graph after each pass, by the pass's name.
        graph_hash: The fingerprint of the rolled graph, under which a saved plan keeps its decision.
        methods: The method chosen for each recurrence, in order.
        provisional: The next call with this signature records again.
        final: Nothing that changes in Python makes it invalid.
        training: The modules that a recording which was refused reached, and whether they were training.
    """

    original: Callable[..., Any]
    capture: Capture | None
    module: fx.GraphModule | None
    plan: Plan
    stages: dict[str, fx.GraphModule] = field(default_factory=dict)
    failures: int = 0
    successes: int = 0
    report: Report = field(default_factory=lambda: Report(False, "this call ran the original, and was compiled"))
    guarded: bool = False
    graph_hash: str = ""
    methods: tuple[Method, ...] = ()
    provisional: bool = False
    final: bool = False
    training: tuple[tuple[torch.nn.Module, bool], ...] = ()
    plain_calls: int = 0

    def valid(self) -> bool:
        """Whether the Python values that the graph was recorded with still stand."""
        if self.final:
            return True
        if self.capture is None:  # what was refused may change its values at each call; in another mode it may do well
            return all(module.training == was for module, was in self.training)
        return self.capture.watch.holds()

    def still_plain(self) -> bool:
        """:meth:`valid`, looked at now and then: the original, which runs, is right in any case."""
        self.plain_calls += 1
        return self.plain_calls % _LOOK_EVERY != 0 or self.valid()

    def __call__(self, tensors: Sequence[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what ``original(*args, **kwargs)`` would, and leave behind what it would leave."""
        if self.module is None or self.capture is None:
            if self.report.reason != self.plan.reason:
                self.report = Report(False, self.plan.reason)
            return self.original(*args, **kwargs)
        state = RandomState.save(g for g, _ in self.capture.generators) if self.capture.draws else None
        try:
            with torch.set_grad_enabled(self.capture.gradients):
                values = self.module(*tensors, *(_read(s) for s in self.capture.states))
        except GuardFailed as failure:
            reason = f"a branch of the recorded run goes the other way: {failure}"
        except GuessError:  # the user's own function: nothing else would tell
            if state is not None:
                state.restore()
            raise
        except Exception as error:  # noqa: BLE001 - the original meets it again and raises it as the user's own
            reason = f"the emitted module raised {type(error).__name__}: {error}"
            _log.info("running the original: %s", reason, exc_info=True)
        else:
            self.successes += 1
            self.report = Report(True, "solved", self._block_reports())
            return self._finish(values, tensors)
        if state is not None:
            state.restore()
        self.failures += 1
        self.report = Report(False, reason)
        if self.failures >= MAX_GUARD_FAILURES and self.failures >= self.successes:
            self.retire(f"its guards failed {self.failures} times; last: {reason}")
        return self.original(*args, **kwargs)

    def current_plan(self) -> Plan:
        """The plan, as its blocks are now."""
        return self.plan if self.module is None else plan_of_now(self.plan, self.module)

    def retire(self, reason: str) -> None:
        """From now on run the original."""
        from dataclasses import replace

        self.module = None
        self.plan = replace(self.plan, solved=False, reason=reason)
        _log.info("gone back to the original: %s", reason)

    def _block_reports(self) -> tuple[BlockReport, ...]:
        assert self.module is not None
        rows = []
        for name, module in self.module.named_children():
            loop = loop_of(module)
            if loop is None:
                continue
            last = last_solution(module)
            rows.append(
                BlockReport(
                    name,
                    method_of(module),
                    loop.trip_count,
                    last.sweeps if last else loop.trip_count,
                    last.certificate if last else None,
                    last.prefixes if last else (),
                    last.residual if last else None,
                    last.active if last else (),
                    last.window if last else None,
                )
            )
        return tuple(rows)

    def _finish(self, values: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> Any:
        """Leave the run's effects, which become visible only now that every guard has held, and build the result."""
        capture = self.capture
        assert capture is not None
        for effect in capture.effects:
            value = values[effect.value]
            if isinstance(effect, AttributeEffect):
                effect.container[effect.key] = value
            else:
                target = tensors[effect.position] if effect.position is not None else effect.target
                assert target is not None
                # Past the version counter, as batch normalisation itself writes: the backward of this very call may
                # have saved the memory (it never reads it). Where gradients flow through it, nothing is emitted.
                target.data.copy_(value.detach())
        results = [
            _view_of_written(source, tensors) if isinstance(source, ViewOfWritten) else values[source]
            for source in capture.sources
        ]
        return join(capture.outputs, results)


def _read(state: StateInput) -> torch.Tensor:
    value = state.container[state.key]
    assert isinstance(value, torch.Tensor)
    return value


def _view_of_written(source: ViewOfWritten, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    value = tensors[source.position] if source.position is not None else source.target
    assert value is not None
    for op, args in source.steps:
        value = op(value, *args)
    return value
