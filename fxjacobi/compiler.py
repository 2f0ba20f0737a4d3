"""From the first call to a specialisation: record, rewrite, check, and decide by measuring."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fxjacobi.blocks import WarmStarting, loop_of, method_of, plan_of_graph
from fxjacobi.capture import Capture, TensorEffect, record
from fxjacobi.choose import Chosen, choose_methods
from fxjacobi.device.limits import device_of_graph, spare_bytes
from fxjacobi.errors import CaptureWarning, ExactnessWarning, GuardFailed, GuessError, PlanError, StateChangedError
from fxjacobi.first_result import demote, difference, put_in_order
from fxjacobi.generators import RandomState
from fxjacobi.growing import growing_sequence
from fxjacobi.loops import Loop
from fxjacobi.ops import GUARDS
from fxjacobi.passes import pipeline
from fxjacobi.plan import Candidate, Plan
from fxjacobi.recorded_run import RecordedRun
from fxjacobi.saved_plan import Decision, fingerprint
from fxjacobi.specialisation import Specialisation
from fxjacobi.timing import started
from fxjacobi.trees import split

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import fx

    from fxjacobi.options import Options

__all__ = ["specialise"]

_log = logging.getLogger(__name__)

_PYTHON_S = 2e-6  # what Python adds to the call of one operation (measured: 3-4 us against 1-2 us)
_WORTH_MEASURING = 0.05  # share of the ordinary run under which saved Python is not worth running it again

_PAIRS = 4  # of short runs, at least

_CLEAR = 2.0  # a ratio of times beyond which one pair of runs is enough to be sure


def specialise(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options, *, again: bool = False
) -> tuple[Any, Specialisation]:
    """Run ``fn`` once, recorded, and return its result with the specialisation for calls like this one.

    A first run that changes Python state may have filled a cache: its specialisation is provisional, and the next call
    is recorded ``again``.

    Raises:
        CaptureError: The run could not be recorded and ``options.strict`` is set.
    """
    tensors = _tensor_arguments(args, kwargs)
    state = RandomState.save()
    recorded = record(fn, args, kwargs)
    if recorded.capture is None:
        assert recorded.failure is not None
        if options.strict:
            raise recorded.failure
        failed = _as_it_is(fn, None, f"not captured: {recorded.failure}", (str(recorded.failure),))
        failed.training = tuple((module, module.training) for module in recorded.watch.modules)
        failed.provisional = isinstance(recorded.failure, StateChangedError) and not again
        if failed.provisional:
            _log.info("the next call is recorded again: %s", recorded.failure)
        else:
            warnings.warn(CaptureWarning(f"runs as it is: {recorded.failure}"), stacklevel=4)
        return recorded.result, failed
    generators = recorded.capture.generators
    state = replace(state, own=generators)
    after = RandomState.save(generator for generator, _ in generators)
    try:
        recorded_run = RecordedRun(fn, args, kwargs, recorded.capture, state, tensors)
        specialisation = _Compilation(recorded_run, options).run()
    except (PlanError, GuessError, ExactnessWarning):  # the last where warnings are errors
        raise
    except Exception as error:  # the user's run is done and right; a fault of the compiler must not take it away
        if options.strict:
            raise
        reason = f"fxjacobi could not compile it ({type(error).__name__}: {error}); please report this"
        _log.exception("compilation failed")
        warnings.warn(CaptureWarning(f"runs as it is: {reason}"), stacklevel=4)
        specialisation = _as_it_is(fn, recorded.capture, reason, (reason,))
    finally:
        after.restore()  # checking and measuring must leave no trace
    if specialisation.capture is not None:
        specialisation.capture = specialisation.capture.forget()
    return recorded.result, specialisation


def _tensor_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    return split((args, kwargs))[1]


def _as_it_is(
    fn: Callable[..., Any], capture: Capture | None, reason: str, refusals: tuple[str, ...] = ()
) -> Specialisation:
    return Specialisation(fn, capture, None, Plan((), (), False, reason, refusals=refusals))


@dataclass
class _Compilation:
    """The work of one specialisation, after its run was recorded."""

    recorded: RecordedRun
    options: Options
    candidates: dict[int, tuple[Candidate, ...]] = field(default_factory=dict)
    """What was measured for each loop, by identity."""

    @property
    def capture(self) -> Capture:
        return self.recorded.capture

    def run(self) -> Specialisation:
        """Rewrite, check, measure."""
        capture = self.capture
        self.options = _within_device(self.options, capture.graph_module)
        if capture.undifferentiable:
            return _as_it_is(
                self.recorded.fn, capture, f"it runs the ordinary way under gradients: {capture.undifferentiable}"
            )
        if any(isinstance(e, TensorEffect) and capture.results[e.value].requires_grad for e in capture.effects):
            return _as_it_is(
                self.recorded.fn, capture, "it writes to its arguments or buffers in a way that gradients flow through"
            )
        stages: dict[str, fx.GraphModule] = {"capture": capture.graph_module}
        module = capture.graph_module
        measured: dict[int, Chosen] = {}
        decision: Decision | None = None
        graph_hash = ""
        for each in pipeline(self.options, gradients=capture.gradients):
            if each.name == "script_loops":
                operands = self.recorded.operands()
                with self.recorded.again():
                    module, measured = choose_methods(module, operands, self.options, decision)
                stages["choose_methods"] = module
            module = stages[each.name] = each.run(module).module
            if each.name == "roll_loops" and not _loops(module) and self.options.measure:
                return self._straight(module, stages)
            if each.name == "roll_loops":
                graph_hash = fingerprint(module)
                decision = self.options.plan.decision(graph_hash) if self.options.plan is not None else None
        _set_warm_start(module, self.options.warm_start)
        self.candidates = {key: choice.candidates for key, choice in measured.items()}
        blocks, edges = plan_of_graph(module, self.candidates)
        gains = tuple(choice.would_gain for choice in measured.values() if choice.would_gain)
        plan = Plan(blocks, edges, True, "kept without measuring", self._contract(), would_gain=gains)
        methods = tuple(choice.method for choice in measured.values())
        result = Specialisation(
            self.recorded.fn,
            capture,
            module,
            plan,
            stages,
            guarded=_guarded(module),
            graph_hash=graph_hash,
            methods=methods,
        )
        if decision is not None and not decision.solved:
            result.retire(f"saved plan: {decision.reason}")
            return result
        if self.options.measure and not self._may_gain(module):
            result.retire("every block runs in the ordinary order, so nothing is gained")
            return result
        try:
            first_s = self._check(result)
            if result.module is not None:
                self._name_blocks(result)  # a device form captures, or says why not, at the first run
            if self.options.measure and result.module is not None and put_in_order(result.module, self.recorded):
                self._name_blocks(result)
                first_s = self._check(result)
            if decision is not None:
                result.plan = replace(
                    result.plan, reason=f"saved plan: {decision.reason}", ordinary_s=decision.ordinary_s,
                    solved_s=decision.solved_s,
                )  # fmt: skip
            elif self.options.measure:
                self._decide(result, first_s)
        except GuardFailed as failure:
            result.retire(f"the run's own guards do not hold on its own data ({failure})")
        return result

    def _may_gain(self, module: fx.GraphModule) -> bool:
        """Whether a block is solved, or enough Python is saved by running steps in order without it."""
        blocks = _loops(module)
        if any(method_of(b) not in ("sequential", "scripted") for b in blocks):
            return True
        scripted = [loop for b in blocks if method_of(b) == "scripted" and (loop := loop_of(b)) is not None]
        if self.capture.ordinary_s < self.options.budget_s / 4:
            return bool(scripted)  # asking costs little
        calls = sum(loop.trip_count * len(loop.body.graph.nodes) for loop in scripted)
        return calls * _PYTHON_S > _WORTH_MEASURING * self.capture.ordinary_s

    def _contract(self) -> str:
        return "exact" if self.options.exact else f"rtol={self.options.rtol:g}, atol={self.options.atol:g}"

    def _straight(self, module: fx.GraphModule, stages: dict[str, fx.GraphModule]) -> Specialisation:
        blocks, edges = plan_of_graph(module)
        reason = growing_sequence(module) or "no loop was found, so the model runs as it is"
        plan = Plan(blocks, edges, False, reason, self._contract())
        return Specialisation(self.recorded.fn, self.capture, None, plan, stages)

    # -- the check: the emitted module against the recorded run ----------------------------------------------------

    def _check(self, result: Specialisation) -> float:
        """Compare with the recorded run; demote every block that differs, and give up if that does not mend it.

        Returns the emitted module's wall time, in seconds.
        """
        assert result.module is not None
        values, seconds = self.recorded.emitted(result.module)
        differs = difference(self.capture, values, self.options)
        if differs is None:
            return seconds
        demoted = demote(result.module, self.recorded)
        if demoted:
            names = ", ".join(demoted)
            warnings.warn(ExactnessWarning(f"{names}: first result differed, so it runs sequentially"), stacklevel=6)
            self._name_blocks(result)
            values, seconds = self.recorded.emitted(result.module)
            differs = difference(self.capture, values, self.options)
        if differs is not None:
            warnings.warn(ExactnessWarning(f"the model runs as it is: {differs}"), stacklevel=6)
            result.retire(f"the first result differed from the recorded run: {differs}")
        return seconds

    def _name_blocks(self, result: Specialisation) -> None:
        """Plan the blocks as they are now."""
        assert result.module is not None
        blocks, edges = plan_of_graph(result.module, self.candidates)
        result.plan = replace(result.plan, blocks=blocks, edges=edges)

    # -- the decision: is it faster? -------------------------------------------------------------------------------

    def _decide(self, result: Specialisation, first_s: float) -> None:
        """Keep the emitted module only if it is measured to be faster than the original.

        ``first_s`` is the time of its first run, the check; a clear case is decided by one run more.
        """
        if result.module is None:
            return
        begun = time.perf_counter()
        solved_times, ordinary_times = [first_s], [self.capture.ordinary_s]
        # A long run whose gain is clear is not run again: its recorded time, less the recorder's own, has to do.
        if self.capture.ordinary_s < self.options.budget_s or first_s * _CLEAR > self.capture.ordinary_s:
            ordinary_times = [self.recorded.original()]
            while len(solved_times) < 6 and (
                len(solved_times) < 2 or time.perf_counter() - begun < self.options.budget_s
            ):
                solved_times.append(self.recorded.emitted(result.module)[1])
                ratio = min(solved_times) / min(ordinary_times)
                # One pair of long runs is enough to see a clear gain; short ones are mostly noise the first time.
                brief = time.perf_counter() - begun < self.options.budget_s / 20
                if not 1 / _CLEAR < ratio < _CLEAR and (len(solved_times) > _PAIRS or not brief):
                    break
                ordinary_times.append(self.recorded.original())
        ordinary, solved = statistics.median(ordinary_times), statistics.median(solved_times[1:] or solved_times)
        solved += _guards_s(self.capture)
        result.plan = replace(result.plan, ordinary_s=ordinary, solved_s=solved)
        if solved >= 0.97 * ordinary:
            result.retire(f"measured {solved * 1e3:.3f} ms against {ordinary * 1e3:.3f} ms for the ordinary run")
        else:
            result.plan = replace(result.plan, reason=f"{ordinary / solved:.1f} times faster than the ordinary run")


def _guards_s(capture: Capture) -> float:
    """What it takes to see, at each call, that the Python values still are what they were."""
    times: list[float] = []
    for _ in range(3):
        clock = started()
        capture.watch.holds()
        times.append(clock())
    return min(times)


def _within_device(options: Options, module: fx.GraphModule) -> Options:
    """Return ``options`` with the memory that the graph's device has to spare, where no limit was asked for."""
    limit = spare_bytes(device_of_graph(module)) if options.memory_limit is None else None
    return options if limit is None else replace(options, memory_limit=max(1, limit))


def _loops(module: fx.GraphModule) -> list[torch.nn.Module]:
    return [m for m in module.children() if loop_of(m) is not None]


def _set_warm_start(module: fx.GraphModule, warm_start: bool) -> None:
    for block in module.children():
        if isinstance(block, WarmStarting):
            block.warm_start = warm_start


def _guarded(module: fx.GraphModule) -> bool:
    """Whether a call may find, while it runs, that the recorded path is not this data's."""
    graphs = [module.graph]
    for loop in _loops(module):
        body = loop_of(loop)
        assert isinstance(body, Loop)
        graphs.append(body.body.graph)
    return any(node.target in GUARDS for graph in graphs for node in graph.nodes)
