"""Choosing each recurrence's method by timing the lawful ones on the recorded run's own operands.

The contract decides what is lawful: bits (``rtol = atol = 0``), or an update and a residual within the tolerance.
Sequential is always a candidate; a method that had to fall back, or that is slower, is not taken.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxjacobi.certificate import Certificate
from fxjacobi.device.fused import FUSING_S
from fxjacobi.device.step_graphs import step_graphs
from fxjacobi.errors import GuessError
from fxjacobi.loops import Carried, Kind, Loop
from fxjacobi.methods.affine import Affine
from fxjacobi.methods.anderson import Anderson
from fxjacobi.methods.candidates import candidates, sized
from fxjacobi.methods.chunked import Chunked
from fxjacobi.methods.damped import Damped
from fxjacobi.methods.jacobi import Jacobi
from fxjacobi.methods.memory_length import memory_length
from fxjacobi.methods.method import Contract
from fxjacobi.methods.native import Native, refusal, refused_at_sight
from fxjacobi.methods.newton import Newton
from fxjacobi.methods.picard import Picard
from fxjacobi.methods.quasi_newton import QuasiNewton
from fxjacobi.methods.sequential import Sequential
from fxjacobi.methods.windowed import Windowed
from fxjacobi.ops import write
from fxjacobi.passes.replace_blocks import replace_blocks
from fxjacobi.plan import Candidate
from fxjacobi.progress import bar
from fxjacobi.scripted_loop import run_in_order, scripted_steps
from fxjacobi.solve import TrialError, lawful
from fxjacobi.solved_loop import SolvedLoop
from fxjacobi.system import System
from fxjacobi.timing import started

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fxjacobi.methods.method import Method
    from fxjacobi.options import Options
    from fxjacobi.saved_plan import Decision

__all__ = ["METHOD_OF_NAME", "Chosen", "choose_methods"]

_log = logging.getLogger(__name__)

METHOD_OF_NAME: dict[str, type[Method]] = {
    "sequential": Sequential,
    "jacobi": Jacobi,
    "windowed": Windowed,
    "chunked": Chunked,
    "native": Native,
    "newton": Newton,
    "quasi_newton": QuasiNewton,
    "damped": Damped,
    "picard": Picard,
    "anderson": Anderson,
    "affine": Affine,
}

_OTHER_CONTRACT = 1e-5
"""The tolerance whose gain an exact plan states."""

_SHORTEST = 32
"""Steps under which no method was seen to gain on a recurrence."""


_FEW_SWEEPS = 3
_SURER = 1.25
"""By how much a method of more sweeps must beat the ordinary order."""

_CALLS = 10
"""Calls of the loop in order that measuring its candidates may take, within the budget ..."""

_LEAST_S = 0.25
"""... and seconds that it may take in any case: tracing a body once takes some milliseconds, however short the loop."""

_WARM_S = 0.5
"""Seconds that a method's first solve may take for tracing and compiling."""

_SILENT_S = 2.0
"""Seconds of measuring after which a terminal shows a bar."""


class _AllChosenError(Exception):
    """Ends the run that measures."""


@dataclass
class Chosen:
    """What was measured for one loop."""

    method: Method
    reason: str
    candidates: tuple[Candidate, ...] = ()
    would_gain: str = ""


def choose_methods(
    module: fx.GraphModule, operands: Sequence[Any], options: Options, decision: Decision | None = None
) -> tuple[fx.GraphModule, dict[int, Chosen]]:
    """Return ``module`` with each bare recurrence solved by the method chosen for it, and the choices by loop identity.

    Args:
        module: The graph after the block passes.
        operands: The recorded run's inputs, on which candidates are timed.
        options: The contract, a forced method, and the seconds that measuring may take.
        decision: A saved one, which is followed without timing anything.

    Raises:
        PlanError: ``decision`` does not fit the graph.
    """
    loops = [m for m in module.children() if isinstance(m, Loop) and m.kind is Kind.RECURRENCE]
    if not loops or (options.method == "auto" and not any(_worth(loop) for loop in loops)):
        return module, {}
    chosen: dict[int, Chosen] = {}
    if decision is not None:
        for place, loop in enumerate(loops):
            method = decision.method(place)
            why = refused_at_sight(loop) if isinstance(method, Native) else None
            chosen[id(loop)] = (
                Chosen(method, "as in the saved plan")
                if why is None
                else Chosen(Sequential(), f"the saved plan names native: {why}")
            )
        return _with_methods(module, chosen, options), chosen
    deadline = time.perf_counter() + options.budget_s
    measuring = bar("measuring methods", after_s=_SILENT_S)

    class _Measure(fx.Interpreter):
        def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            block = self.fetch_attr(target)
            if isinstance(block, Loop) and block.kind is Kind.RECURRENCE and id(block) not in chosen:
                share = max(0.0, deadline - time.perf_counter()) / (len(loops) - len(chosen))
                chosen[id(block)] = _choose(block, args, options, share, tick)
                if len(chosen) == len(loops):
                    raise _AllChosenError  # what comes after them need not be computed
            return super().call_module(target, args, kwargs)

    with torch.no_grad(), contextlib.suppress(_AllChosenError), measuring as tick:
        interpreter = _Measure(module)
        interpreter.extra_traceback = (
            False  # to report the exception that ends it, it would import all of torch.compile
        )
        interpreter.run(*operands)

    return _with_methods(module, chosen, options), chosen


def _with_methods(module: fx.GraphModule, chosen: dict[int, Chosen], options: Options) -> fx.GraphModule:
    def replace(loop: Loop, _: fx.Node) -> nn.Module:
        choice = chosen.get(id(loop))
        if choice is None:
            return loop
        if isinstance(choice.method, Sequential):
            before = getattr(loop, "reason", "") if any(n.target is write for n in loop.body.graph.nodes) else ""
            loop.reason = "; ".join(part for part in (choice.reason, before) if part)
            return loop
        contract = Contract(options.rtol, options.atol)
        solved = SolvedLoop(
            loop, choice.method, contract, guess=options.guess, warm_start=options.warm_start,
            memory_limit=options.memory_limit,
        )  # fmt: skip
        solved.reason = choice.reason
        solved.fuse = options.budget_s >= FUSING_S
        return solved

    return replace_blocks(module, replace).module


def _worth(loop: Loop) -> bool:
    return loop.trip_count >= _SHORTEST


def _choose(loop: Loop, operands: Sequence[Any], options: Options, seconds: float, tick: Callable[[], None]) -> Chosen:
    contract = Contract(options.rtol, options.atol)
    if options.method != "auto":
        return _forced(loop, operands, options, contract)
    if not _worth(loop):
        return Chosen(Sequential(), f"only {loop.trip_count} steps")
    sequential = _sequential_s(loop, operands, seconds / 4)
    stated = Candidate("sequential", sequential, loop.trip_count, note="the ordinary order")
    tick()
    if options.exact:
        reason = "each step needs the one before, and batched rounding would change bits"
        gain = _would_gain(loop, operands, sequential, seconds / 2)
        return Chosen(Sequential(), reason, (stated,), gain)
    seconds = min(seconds, max(_LEAST_S, _CALLS * sequential))
    method, best, measured = _fastest(loop, operands, contract, options, sequential, seconds, tick)
    if isinstance(method, Sequential):
        return Chosen(method, "no lawful method was faster than the ordinary order", (stated, *measured))
    reason = f"{sequential / best:.1f} times faster than its {loop.trip_count} steps in order"
    return Chosen(method, reason, (stated, *measured))


def _sequential_s(loop: Loop, operands: Sequence[Any], seconds: float) -> float:
    """The time of all steps in order, as they will run where nothing else is faster."""
    if step_graphs(loop) is not None or scripted_steps(loop) is not None:
        clock = started()
        run_in_order(loop, operands)  # its first call is slower
        first = clock()
        if first > seconds:
            return first
        clock = started()
        run_in_order(loop, operands)
        return clock()
    # In Python, from as many steps as fit into ``seconds`` (at least 16).
    aligned = loop.align(operands)
    outputs: list[Sequence[Any]] = []
    clock, begun = started(), time.perf_counter()
    for step in range(loop.trip_count):
        outputs.append(loop.body(*loop.bind(aligned, step, outputs)))
        if step >= 15 and time.perf_counter() - begun > seconds:
            break
    return clock() * loop.trip_count / len(outputs)


def _fastest(
    loop: Loop,
    operands: Sequence[Any],
    contract: Contract,
    options: Options,
    sequential: float,
    seconds: float,
    tick: Callable[[], None],
) -> tuple[Method, float, list[Candidate]]:
    system = System(loop, tuple(operands), memory_limit=options.memory_limit)
    best: tuple[Method, float] = (Sequential(), sequential)
    why = refusal(system)  # compiles it: not what the budget is for
    rows = [Candidate("native", lawful=False, note=why)] if why is not None else []
    deadline = time.perf_counter() + seconds

    swept = False

    def leader() -> Method:
        return best[0]

    cores = torch.get_num_threads() if system.base()[0].device.type == "cpu" else 1
    try:
        likely = candidates(loop, False, system=system, contract=contract)
    except Exception as error:  # noqa: BLE001 - as in _time()
        return *best, [_failed("measuring its memory", error)]
    for method in _by_lanes(likely, cores, leader):
        if isinstance(method, Sequential):
            continue
        # Machine code is measured whatever looking for the memory took: it is two or three solves of the loop.
        if time.perf_counter() > deadline and not (isinstance(method, Native) and seconds > 0):
            rows.append(Candidate(method.name, note="not measured: the budget was spent"))
            continue
        # The likeliest sweeps are let finish, so that something is known whatever their first call must trace and compile.
        surely = isinstance(method, Native) or not swept
        trial = replace(contract, trial_until=math.inf if surely else deadline)
        row, time_s = _time(loop, operands, method, trial, options, best[1], deadline, 2 if surely else 1)
        swept = swept or not isinstance(method, Native)
        rows.append(row)
        tick()
        # What takes many sweeps takes more of them on other inputs; the ordinary order always takes the same.
        sure = row.sweeps is not None and row.sweeps <= _FEW_SWEEPS
        bar = best[1] if sure or not isinstance(best[0], Sequential) else best[1] / _SURER
        if time_s is not None and time_s < bar:
            best = (method, time_s)
    return best[0], best[1], rows


def _by_lanes(methods: Sequence[Method], cores: int, leader: Callable[[], Method]) -> Iterator[Method]:
    """Yield ``methods``, the first that runs chunks also with a lane for each core, those after it as was then faster."""
    lanes = 0
    for method in methods:
        if not isinstance(method, Chunked) or cores == 1:
            yield method
        elif lanes:
            yield replace(method, lanes=lanes)
        else:
            yield method
            yield replace(method, lanes=cores)
            found = leader()
            lanes = found.lanes if isinstance(found, Chunked) else 1


def _time(
    loop: Loop,
    operands: Sequence[Any],
    method: Method,
    contract: Contract,
    options: Options,
    best: float,
    deadline: float,
    least: int = 1,
) -> tuple[Candidate, float | None]:
    """Time one method: a first solve, which also warms up, and up to three more while it is in the race.

    After ``deadline`` no further solve starts, once there were ``least``.
    """
    # Cold, also where calls will start warm: the same operands again would start from their own solution.
    solved = SolvedLoop(loop, method, contract, guess=options.guess, memory_limit=options.memory_limit)
    times: list[float] = []
    while len(times) < 4:
        clock = started()
        try:
            solved(*operands)
        except TrialError as end:
            return Candidate(method.name, note=str(end)), None
        except GuessError:
            raise  # the caller's own function
        except Exception as error:  # noqa: BLE001 - a candidate's fault must not take the other ways of the loop away
            return _failed(method.name, error), None
        times.append(clock())
        # A first solve traces and compiles: it shows that a method is slow only where it is slower than that.
        slow = min(times) > 2 * best + (_WARM_S if len(times) == 1 else 0.0)
        if slow or (len(times) >= least and time.perf_counter() > deadline):
            break
    last = solved.last
    assert last is not None
    median = statistics.median(times[1:] or times)
    if last.certificate in (Certificate.FELL_BACK, Certificate.SEQUENTIAL):  # its residual was beyond the tolerance
        return Candidate(method.name, median, last.sweeps, note=last.certificate.value), None
    return Candidate(method.name, median, last.sweeps), median


def _failed(name: str, error: Exception) -> Candidate:
    """Note a method, or what its size comes from, that raised: a fault of ours, which the plan and the log name."""
    _log.warning("%s failed while it was measured", name, exc_info=error)
    return Candidate(name, lawful=False, note=f"it raised {type(error).__name__}: {error}")


def _would_gain(loop: Loop, operands: Sequence[Any], sequential: float, seconds: float) -> str:
    """What the likeliest method gains at a tolerance of 1e-5, if the loop is long enough to ask; nothing if it fails."""
    if not _has_float_state(loop) or 8 * sequential > seconds:
        return ""  # asking would cost the user more than the answer is worth
    contract = Contract(_OTHER_CONTRACT, 0.0)
    system = System(loop, tuple(operands))
    try:
        likely = next(iter(candidates(loop, False, system=system, contract=contract)), None)
    except Exception as error:  # noqa: BLE001 - a sentence of the plan is not worth the compile
        _failed("measuring its memory", error)
        return ""
    if likely is None or isinstance(likely, Sequential):
        return ""
    from fxjacobi.options import Options

    deadline = time.perf_counter() + seconds
    trial = replace(contract, trial_until=deadline)
    row, median = _time(loop, operands, likely, trial, Options(rtol=_OTHER_CONTRACT), sequential, deadline)
    if median is None or median >= sequential:
        return ""
    return f"exact: sequential; at rtol=1e-5: {row.method}, {sequential / median:.1f}x on this block"


def _forced(loop: Loop, operands: Sequence[Any], options: Options, contract: Contract) -> Chosen:
    kind = METHOD_OF_NAME[options.method]
    system = System(loop, tuple(operands), memory_limit=options.memory_limit)
    why = refusal(system) if kind is Native and not contract.exact else None
    if why is None and not lawful(kind(), loop, contract):
        return Chosen(Sequential(), f"{options.method} was asked for, and is not lawful here under this contract")
    if why is not None:
        return Chosen(Sequential(), f"native was asked for: {why}")
    noted: tuple[Candidate, ...] = ()
    try:
        likely = candidates(loop, False, system=system, contract=contract) if loop.trip_count > 1 else []
        method = next((m for m in likely if isinstance(m, kind)), None)
        if method is None:
            length = memory_length(system, contract) if kind in (Windowed, Chunked) else None
            method = sized(kind, loop, length)
    except Exception as error:  # noqa: BLE001 - as in _time()
        method, noted = sized(kind, loop, None), (_failed("measuring its memory", error),)
    return Chosen(method, f"{options.method} was asked for", noted)


def _has_float_state(loop: Loop) -> bool:
    placeholders = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
    return any(
        isinstance(binding, Carried) and node.meta["spec"] is not None and node.meta["spec"].dtype.is_floating_point
        for node, binding in zip(placeholders, loop.bindings, strict=True)
    )
