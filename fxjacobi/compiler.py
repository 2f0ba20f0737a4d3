"""From the first call to a specialisation: record, rewrite, check, and decide by measuring."""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi.blocks import last_solution, loop_of, method_of, plan_of_graph
from fxjacobi.capture import AttributeEffect, Capture, TensorEffect, record
from fxjacobi.choose import Chosen, choose_methods
from fxjacobi.errors import CaptureWarning, ExactnessWarning, GuardFailed, PlanError
from fxjacobi.loops import Loop
from fxjacobi.ops import GUARDS
from fxjacobi.passes import pipeline
from fxjacobi.placement import placed_copy
from fxjacobi.plan import Plan
from fxjacobi.saved_plan import Decision, fingerprint
from fxjacobi.scripted_loop import ScriptedLoop, run_in_order, scripted_steps
from fxjacobi.solved_loop import SolvedLoop
from fxjacobi.specialisation import RandomState, Specialisation
from fxjacobi.trees import join, split
from fxjacobi.verify import equal, first_difference
from fxjacobi.watch import MISSING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fxjacobi.options import Options

__all__ = ["specialise"]

_ACCUMULATED = 1000.0  # tolerances that errors of single steps may add up to in an output

_log = logging.getLogger(__name__)

_PYTHON_S = 2e-6  # what Python adds to the call of one operation (measured: 3-4 us against 1-2 us)
_WORTH_MEASURING = 0.05  # share of the ordinary run under which saved Python is not worth running it again

_MANY_SWEEPS = 0.25  # share of the steps from which sweeps are timed against the steps in order

_CLEAR = 2.0  # a ratio of times beyond which one pair of runs is enough to be sure


def specialise(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> tuple[Any, Specialisation]:
    """Run ``fn`` once, recorded, and return its result with the specialisation for calls like this one.

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
        warnings.warn(CaptureWarning(f"runs as it is: {recorded.failure}"), stacklevel=4)
        return recorded.result, _as_it_is(fn, None, f"not captured: {recorded.failure}", (str(recorded.failure),))
    after = RandomState.save()
    try:
        specialisation = _Compilation(fn, args, kwargs, recorded.capture, options, state, tensors).run()
    except (PlanError, ExactnessWarning):  # the latter where warnings are errors
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

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    capture: Capture
    options: Options
    before: RandomState
    tensors: list[torch.Tensor]

    def run(self) -> Specialisation:
        """Rewrite, check, measure."""
        capture = self.capture
        if capture.undifferentiable:
            return _as_it_is(self.fn, capture, f"it runs the ordinary way under gradients: {capture.undifferentiable}")
        if any(isinstance(e, TensorEffect) and capture.results[e.value].requires_grad for e in capture.effects):
            return _as_it_is(
                self.fn, capture, "it writes to its arguments or buffers in a way that gradients flow through"
            )
        stages: dict[str, fx.GraphModule] = {"capture": capture.graph_module}
        module = capture.graph_module
        measured: dict[int, Chosen] = {}
        decision: Decision | None = None
        graph_hash = ""
        for each in pipeline(self.options, gradients=capture.gradients):
            if each.name == "script_loops":
                self.before.restore()
                with self._memory_before():
                    module, measured = choose_methods(module, self._operands(), self.options, decision)
                stages["choose_methods"] = module
            module = stages[each.name] = each.run(module).module
            if each.name == "roll_loops" and not _loops(module) and self.options.measure:
                return self._straight(module, stages)
            if each.name == "roll_loops":
                graph_hash = fingerprint(module)
                decision = self.options.plan.decision(graph_hash) if self.options.plan is not None else None
        rows = {key: choice.candidates for key, choice in measured.items()}
        blocks, edges = plan_of_graph(module, rows)
        gains = tuple(choice.would_gain for choice in measured.values() if choice.would_gain)
        plan = Plan(blocks, edges, True, "kept without measuring", self._contract(), would_gain=gains)
        methods = tuple(choice.method for choice in measured.values())
        result = Specialisation(
            self.fn, capture, module, plan, stages, guarded=_guarded(module), graph_hash=graph_hash, methods=methods
        )
        if decision is not None and not decision.solved:
            result.retire(f"saved plan: {decision.reason}")
            return result
        if self.options.measure and not self._may_gain(module):
            result.retire("every block runs in the ordinary order, so nothing is gained")
            return result
        try:
            first_s = self._check(result)
            if self.options.measure and result.module is not None and self._put_in_order(result):
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
        plan = Plan(blocks, edges, False, "no loop was found, so the model runs as it is", self._contract())
        return Specialisation(self.fn, self.capture, None, plan, stages)

    # -- the check: the emitted module against the recorded run ----------------------------------------------------

    def _operands(self) -> list[torch.Tensor]:
        """The recorded run's inputs as they were before it."""
        saved = {e.position: e.saved for e in self.capture.effects if isinstance(e, TensorEffect)}
        inputs: list[torch.Tensor] = []
        for position, tensor in enumerate(self.tensors):
            earlier = saved.get(position)
            inputs.append(tensor if earlier is None else placed_copy(earlier))
        return inputs + [s.before for s in self.capture.states if s.before is not None]

    @contextlib.contextmanager
    def _memory_before(self) -> Iterator[None]:
        """Buffers and parameters hold, inside, what they held before the recorded run."""
        effects = [e for e in self.capture.effects if isinstance(e, TensorEffect) and e.target is not None]
        with torch.no_grad():
            now = [e.target.detach().clone() for e in effects if e.target is not None]
            try:
                for e in effects:
                    if e.target is not None and e.saved is not None:
                        e.target.detach().copy_(e.saved)
                yield
            finally:
                for e, value in zip(effects, now, strict=True):
                    if e.target is not None:
                        e.target.detach().copy_(value)

    def _run_emitted(self, module: fx.GraphModule) -> tuple[Sequence[torch.Tensor], float]:
        operands = self._operands()
        for block in module.children():
            if isinstance(block, SolvedLoop):
                block.forget()  # the same operands again would start from their own solution
        self.before.restore()
        with self._memory_before(), torch.set_grad_enabled(self.capture.gradients):
            start = time.perf_counter()
            values = module(*operands)
            return values, time.perf_counter() - start

    def _differs(self, values: Sequence[torch.Tensor]) -> Any:
        found = [v.detach() for v in values]
        for position, (value, wanted) in enumerate(zip(values, self.capture.results, strict=True)):
            if value.requires_grad != wanted.requires_grad:
                return f"output {position} requires_grad is {value.requires_grad}, ordinarily {wanted.requires_grad}"
        if self.options.exact:
            return first_difference(found, [r.detach() for r in self.capture.results])
        return self._beyond_tolerance(found)

    def _beyond_tolerance(self, found: Sequence[torch.Tensor]) -> str | None:
        """A gross difference: each step is within its tolerance, and a stable recurrence adds up a bounded number."""
        for position, (a, b) in enumerate(zip(found, self.capture.results, strict=True)):
            wanted = b.detach()
            if equal(a, wanted):
                continue
            if a.shape != wanted.shape or a.dtype != wanted.dtype or not (a.is_floating_point() or a.is_complex()):
                return f"output {position} differs in shape, dtype or in integers"
            scale = wanted[wanted.isfinite()].abs().max() if bool(wanted.isfinite().any()) else wanted.new_zeros(())
            bound = _ACCUMULATED * (self.options.atol + self.options.rtol * float(scale))
            unequal = (a != wanted) & ~(a.isnan() & wanted.isnan())
            error = float((a - wanted)[unequal].abs().max())
            if not error <= bound:
                return f"output {position} is off by {error:.3g}, more than {bound:.3g}"
        return None

    def _check(self, result: Specialisation) -> float:
        """Compare with the recorded run; demote every block that differs, and give up if that does not mend it.

        Returns the emitted module's wall time, in seconds.
        """
        assert result.module is not None
        values, seconds = self._run_emitted(result.module)
        difference = self._differs(values)
        if difference is None:
            return seconds
        demoted = self._demote(result.module)
        if demoted:
            names = ", ".join(demoted)
            warnings.warn(ExactnessWarning(f"{names}: first result differed, so it runs sequentially"), stacklevel=6)
            blocks, edges = plan_of_graph(result.module)
            result.plan = replace(result.plan, blocks=blocks, edges=edges)
            values, seconds = self._run_emitted(result.module)
            difference = self._differs(values)
        if difference is not None:
            warnings.warn(ExactnessWarning(f"the model runs as it is: {difference}"), stacklevel=6)
            result.retire(f"the first result differed from the recorded run: {difference}")
        return seconds

    def _put_in_order(self, result: Specialisation) -> bool:
        """Put the steps in order back where sweeps were many and running the steps is faster; return whether any were.

        A fixed point that was not reached, or an array of which each sweep settles a step or two, gains nothing.
        """
        assert result.module is not None
        module, reasons = result.module, dict[int, str]()

        class _Time(fx.Interpreter):
            def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                block = self.fetch_attr(target)
                loop, last = loop_of(block), last_solution(block)
                begun = time.perf_counter()
                values = super().call_module(target, args, kwargs)
                solved_s = time.perf_counter() - begun
                many = last is not None and last.sweeps > _MANY_SWEEPS * (loop.trip_count if loop else 0)
                if loop is None or not many or isinstance(block, ScriptedLoop) or scripted_steps(loop) is None:
                    return values
                run_in_order(loop, args)
                begun = time.perf_counter()
                values = run_in_order(loop, args)
                if time.perf_counter() - begun < solved_s:
                    assert last is not None
                    loop.reason = f"{last.sweeps} sweeps by {method_of(block)} took longer than {loop.trip_count} steps"
                    module.add_module(str(target), ScriptedLoop(loop))
                    reasons[id(loop)] = loop.reason
                return values

        blocks = [(b, loop_of(b), last_solution(b)) for b in _loops(module)]
        if not any(
            loop is not None and last is not None and last.sweeps > _MANY_SWEEPS * loop.trip_count
            and not isinstance(b, ScriptedLoop) for b, loop, last in blocks
        ):  # fmt: skip
            return False
        operands = self._operands()
        self.before.restore()
        with self._memory_before(), torch.set_grad_enabled(self.capture.gradients):
            _Time(module).run(*operands)
        if reasons:
            rows, edges = plan_of_graph(module)
            result.plan = replace(result.plan, blocks=rows, edges=edges)
        return bool(reasons)

    def _demote(self, module: fx.GraphModule) -> list[str]:
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
                    equal(a.detach(), b.detach())
                    for a, b in zip(found, wanted, strict=True)
                    if isinstance(b, torch.Tensor)
                )
                if not same:
                    demoted.append(f"{target} ({method_of(block)})")
                    loop.reason = f"its first result by {method_of(block)} differed from the ordinary run's"
                    module.add_module(str(target), loop)
                return wanted

        operands = self._operands()
        self.before.restore()
        with self._memory_before(), torch.set_grad_enabled(self.capture.gradients):
            _Compare(module).run(*operands)
        return demoted

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
            ordinary_times = [self._run_original()]
            while len(solved_times) < 6 and (
                len(solved_times) < 2 or time.perf_counter() - begun < self.options.budget_s
            ):
                solved_times.append(self._run_emitted(result.module)[1])
                ratio = min(solved_times) / min(ordinary_times)
                if not 1 / _CLEAR < ratio < _CLEAR:
                    break
                ordinary_times.append(self._run_original())
        ordinary, solved = statistics.median(ordinary_times), statistics.median(solved_times[1:] or solved_times)
        result.plan = replace(result.plan, ordinary_s=ordinary, solved_s=solved)
        if solved >= 0.97 * ordinary:
            result.retire(f"measured {solved * 1e3:.3f} ms against {ordinary * 1e3:.3f} ms for the ordinary run")
        else:
            result.plan = replace(result.plan, reason=f"{ordinary / solved:.1f} times faster than the ordinary run")

    def _run_original(self) -> float:
        """Time the original on the recorded run's inputs, leaving no trace."""
        operands = self._operands()
        attributes = [e for e in self.capture.effects if isinstance(e, AttributeEffect)]
        now = [e.container.get(e.key) for e in attributes]
        skeleton, _ = split((self.args, self.kwargs))
        args, kwargs = join(skeleton, operands[: len(self.tensors)])
        self.before.restore()
        with self._memory_before():
            for e in attributes:
                if e.before is MISSING:
                    del e.container[e.key]
                else:
                    e.container[e.key] = e.before
            try:
                start = time.perf_counter()
                self.fn(*args, **kwargs)
                return time.perf_counter() - start
            finally:
                for e, value in zip(attributes, now, strict=True):
                    e.container[e.key] = value


def _loops(module: fx.GraphModule) -> list[torch.nn.Module]:
    return [m for m in module.children() if loop_of(m) is not None]


def _guarded(module: fx.GraphModule) -> bool:
    """Whether a call may find, while it runs, that the recorded path is not this data's."""
    graphs = [module.graph]
    for loop in _loops(module):
        body = loop_of(loop)
        assert isinstance(body, Loop)
        graphs.append(body.body.graph)
    return any(node.target in GUARDS for graph in graphs for node in graph.nodes)
