"""What the device forms of the methods share: what they start from, the check of the result, and the results.

A sweep is a captured graph that also measures its updates; these travel to the host, which decides as the method does, one
sweep late. In the end the equations of all steps are evaluated at the result, in a graph too, and one read says whether
each holds within the tolerance (:func:`fxjacobi.solve.solve`). Where one does not, the block is solved uncaptured, which
completes in the ordinary order.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import torch
from typing_extensions import override

from fxjacobi.certificate import Certificate, Solution
from fxjacobi.device.form import DeviceForm, Session
from fxjacobi.device.hazards import indexes_by_guess
from fxjacobi.device.norms import agreement, distance, relative
from fxjacobi.device.runner import Captured, Late, Refused
from fxjacobi.loops import Carried
from fxjacobi.methods.guess import Base
from fxjacobi.methods.method import Contract
from fxjacobi.methods.settle import floors
from fxjacobi.system import System

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxjacobi.device.operands import StaticOperands
    from fxjacobi.device.runner import FlagReader, GraphRunner
    from fxjacobi.solved_loop import SolvedLoop

__all__ = ["Progress", "SolveForm", "SolveSession"]


class SolveForm(DeviceForm):
    """A loop solved within a tolerance, from the values before the loop.

    Args:
        solved: The loop with its method.
        runner: What captures.
        device: Where.
    """

    def __init__(self, solved: SolvedLoop, runner: GraphRunner, device: torch.device) -> None:
        # The result is of a sweep more than uncaptured, so it differs within the tolerance: the check decides.
        super().__init__(runner, device, compare=False)
        loop = self.loop = solved.loop
        self.contract, self.memory_limit = solved.contract, solved.memory_limit
        placeholders = [n for n in loop.body.graph.nodes if n.op == "placeholder"]
        carried = [n for n, b in zip(placeholders, loop.bindings, strict=True) if isinstance(b, Carried)]
        hazard = indexes_by_guess(loop.body, carried)
        if self.contract.exact or solved.batch is not None:
            self.refused = Refused("only sweeps within a tolerance are captured")
        elif not isinstance(solved.guess, Base) or solved.warm_start:
            self.refused = Refused("its sweeps start from another guess than the values before the loop")
        elif hazard is not None:
            self.refused = Refused(hazard)

    @property
    def operations(self) -> int:
        """How many operations a step holds."""
        return max(1, len([node for node in self.loop.body.graph.nodes if node.op.startswith("call")]))

    @override
    def describe(self) -> str:
        return "each sweep is a captured graph"


class Progress(Protocol):
    """A method's own decision, from the numbers of each sweep.

    Attributes:
        prefixes: How many equations were final after each sweep.
        done: Whether the tolerance is met.
        stalled: Whether sweeps help no more.
    """

    prefixes: list[int]
    done: bool
    stalled: bool

    def add(self, numbers: Sequence[float]) -> None:
        """Take the numbers of one sweep in."""
        ...


class SolveSession(Session):
    """Programs of one method: ``begin`` a call, ``sweep``, and ``check`` the trajectory that the last sweep left."""

    def __init__(self, form: SolveForm, operands: StaticOperands) -> None:
        super().__init__(operands)
        self.form, self.contract = form, form.contract
        self.total = form.loop.trip_count
        self.system = self.make_system()
        self.found: tuple[torch.Tensor, ...] = ()
        """The state's components of all steps, then other outputs that are results, where the sweep yields them."""
        self.reader: FlagReader
        self.begin: Captured
        self.sweep: Captured
        self._check: Captured
        self._verdict = form.runner.reader(2, torch.float64, form.device)

    def make_system(self) -> System:
        """Return the equations of the operands loaded; inside a capture, its tensors are the capture's."""
        return System(self.form.loop, self.operands.values, memory_limit=self.form.memory_limit)

    @abstractmethod
    def begin_program(self) -> Sequence[torch.Tensor]:
        """Gather the inputs and put the first guess in place."""

    @abstractmethod
    def sweep_program(self) -> Sequence[torch.Tensor]:
        """Sweep once; return the numbers for the host, then what :attr:`found` is."""

    def capture(self) -> Refused | None:
        """Capture the three programs, each warmed up on what the one before left."""
        if self.system.rows_limit < self.total:
            return Refused("its steps do not fit in the memory allowed, all at once")
        self.begin_program()
        for _ in range(2):  # ways of batching are chosen and traced before anything is captured
            self.found = tuple(self.sweep_program()[1:])
            self._check_program()
        begin = self._captured(self.begin_program)
        if isinstance(begin, Refused):
            return begin
        sweep = self._captured(self.sweep_program)
        if isinstance(sweep, Refused):
            return sweep
        self.begin, self.sweep, self.found = begin, sweep, sweep.outputs[1:]
        return self.capture_check()

    def _captured(self, program: Callable[[], Sequence[torch.Tensor]]) -> Captured | Refused:
        found = self.form.runner.capture(program, self.form.device)
        if not isinstance(found, Refused):
            found.replay()  # the next program is warmed up on what this one leaves
        return found

    def capture_check(self) -> Refused | None:
        """Capture the check of what :attr:`found` now is."""
        check = self._captured(self._check_program)
        if isinstance(check, Refused):
            return check
        self._check = check
        return None

    def _check_program(self) -> Sequence[torch.Tensor]:
        """Evaluate every equation at the trajectory that the last sweep left."""
        system = self.system
        states = tuple(self.found[: len(system.components)])
        outputs = system.evaluate(states)
        values = system.pick(outputs)
        floor = floors(values, self.contract)
        holds = (distance(values, states, self.contract) <= torch.maximum(floor, torch.ones_like(floor))).all()
        for step in sorted({0, self.total // 2, self.total - 1}):
            alone = system.pick(system.alone(states, step))
            holds = holds & agreement(alone, tuple(value[step] for value in values))
        residual = relative(values, states, Contract(rtol=1.0))
        return [torch.stack([holds.double(), residual]), *(outputs[o] for o in system.others)]

    def swept(self, progress: Progress, most: int, lag: int = 1) -> tuple[tuple[Any, ...], Solution] | None:
        """Sweep until ``progress`` says so, at most ``most`` times, and finish; ``None`` where it is not done then.

        Args:
            progress: Decides, from the first output of each sweep.
            most: Sweeps that the method may take.
            lag: How many sweeps late their numbers are read.
        """
        late = Late(self.reader, lag)
        self.begin.replay()
        bound = most if self.contract.max_sweeps is None else min(self.contract.max_sweeps, most)
        launched = 0
        while launched < bound and not progress.done and not progress.stalled:
            self.sweep.replay()
            launched += 1
            late.post(self.sweep.outputs[0])
            if late.due():
                progress.add(late.take()[0])
        while late.pending:
            numbers, _ = late.take()
            if not progress.done:
                progress.add(numbers)
        return self.finish(tuple(progress.prefixes)) if progress.done else None

    def finish(self, prefixes: tuple[int, ...]) -> tuple[tuple[Any, ...], Solution] | None:
        """Return the results in memory of their own if every equation holds, ``None`` otherwise."""
        self._check.replay()
        self._verdict.post(self._check.outputs[0])
        holds, residual = self._verdict.take()
        if not holds:
            return None
        states = tuple(self.found[: len(self.system.components)])
        others = dict(zip(self.system.others, self._check.outputs[1:], strict=True))
        own = [r.clone() if isinstance(r, torch.Tensor) else r for r in self.system.results(states, others)]
        return tuple(own), Solution(len(prefixes), Certificate.RESIDUAL, residual, prefixes)
