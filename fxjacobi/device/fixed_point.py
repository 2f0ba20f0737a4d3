"""A fixed-point iteration on a device: each step a captured graph that compares its own state, the answer read late.

    x_{t+1} = f(x_t),    same_t = all(bits(x_{t+1}) == bits(x_t)),    t < T

The host reads ``same_t`` when step ``t + 1`` is already enqueued. That step, and every later one, leaves a state that
repeated as it is; in a cycle of period ``p`` (R. P. Brent's algorithm, as in :mod:`fxjacobi.fixed_point`) ``(T - n) % p``
more steps lead from any ``n`` steps to the state after ``T``. So the extra step changes no answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from fxjacobi.certificate import Certificate, Solution
from fxjacobi.device.form import DeviceForm, Session
from fxjacobi.device.operands import copied
from fxjacobi.device.runner import Captured, Late, Refused
from fxjacobi.device.state import CarriedState
from fxjacobi.loops import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.device.operands import StaticOperands
    from fxjacobi.device.runner import GraphRunner
    from fxjacobi.loops import Loop

__all__ = ["FixedPointForm"]


class FixedPointForm(DeviceForm):
    """See the module's docstring.

    Args:
        loop: A loop of :attr:`fxjacobi.loops.Kind.FIXED_POINT`.
        runner: What captures.
        device: Where.
    """

    def __init__(self, loop: Loop, runner: GraphRunner, device: torch.device) -> None:
        super().__init__(runner, device)
        self.loop = loop
        last = loop.trip_count - 1
        if any(not isinstance(r, Step) or r.step != last for r in loop.results):
            self.refused = Refused("results of steps before the last are wanted")

    @override
    def describe(self) -> str:
        return "each step is a captured graph"

    @override
    def build(self, operands: StaticOperands) -> Session | Refused:
        state = CarriedState.of(self.loop, operands)
        if isinstance(state, Refused):
            return state
        saved = [torch.empty_like(buffer) for buffer in state.buffers]
        state.start()

        def step() -> Sequence[torch.Tensor]:
            outputs = state.materialised(self.loop.body.forward(*state.arguments()))
            new = state.after(outputs)
            same = state.unchanged(new, state.buffers)
            cycled = state.unchanged(new, saved)
            state.write(new)
            return [torch.stack([same, cycled]), *(outputs[r.output] for r in self.loop.results)]

        captured = self.runner.capture(step, self.device)
        if isinstance(captured, Refused):
            return captured
        return _FixedPointSession(self, operands, state, saved, captured)


class _FixedPointSession(Session):
    def __init__(
        self,
        form: FixedPointForm,
        operands: StaticOperands,
        state: CarriedState,
        saved: list[torch.Tensor],
        captured: Captured,
    ) -> None:
        super().__init__(operands)
        self._trip_count = form.loop.trip_count
        self._state = state
        self._saved = saved
        self._captured = captured
        self._reader = form.runner.reader(2, torch.bool, form.device)

    @override
    def solve(self) -> tuple[tuple[Any, ...], Solution] | None:
        flags, *outputs = self._captured.outputs
        total = self._trip_count
        done = self._state.start()
        late = Late(self._reader)
        self._save()
        saved_at = done
        solution = Solution(total, Certificate.SEQUENTIAL)
        while done < total:
            self._captured.replay()
            done += 1
            late.post(flags, (done, saved_at))
            if done & (done - 1) == 0:
                self._save()
                saved_at = done
            if not late.due():
                continue
            (same, cycled), (at, since) = late.take()
            if same or cycled:
                period = 1 if same else at - since
                for _ in range((total - done) % period):
                    self._captured.replay()
                    done += 1
                certificate = Certificate.REPEATED if same else Certificate.CYCLED
                solution = Solution(at if same else done, certificate)
                break
        while late.pending:
            late.take()
        return tuple(copied(output) for output in outputs), solution

    def _save(self) -> None:
        torch._foreach_copy_(self._saved, self._state.buffers)
