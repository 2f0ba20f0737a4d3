"""A loop that applies one and the same function again and again, stopped when its state comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.bits import bits_of
from fxjacobi.certificate import Certificate, Solution
from fxjacobi.device.fixed_point import FixedPointForm
from fxjacobi.device.form import Explained, Forms
from fxjacobi.equal_steps import equal_steps
from fxjacobi.errors import PassError
from fxjacobi.loops import Carried, Kind, Loop, Stacked, Step
from fxjacobi.placement import placed_copy
from fxjacobi.scripted_loop import one_step

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FixedPoint", "same_bits"]

_PATIENCE = 16
"""Off the CPU a comparison waits for the device, so after this many misses every other step goes unchecked, and so on."""

_REASON = "nothing changes from step to step but the state, so its first exact repeat ends it"


def _same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether a kernel cannot tell ``a`` from ``b``: the same bits (of NaNs and zeros too), dtype, shape and strides."""
    return a is b or (_same_layout(a, b) and torch.equal(bits_of(a.detach()), bits_of(b.detach())))


class _State:
    """All that later steps read, the newest values first; the integer views are made once."""

    __slots__ = ("_bits", "values")

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        self.values = values
        self._bits: list[torch.Tensor | None] = [None] * len(values)

    def bits(self, index: int) -> torch.Tensor:
        """The bits of one value."""
        found = self._bits[index]
        if found is None:
            found = self._bits[index] = bits_of(self.values[index])
        return found

    def equals(self, other: _State) -> bool:
        """Whether the two states are the same to every kernel; misses are found in the newest value."""
        for i, (a, b) in enumerate(zip(self.values, other.values, strict=True)):
            if a is not b and not (a.dtype is b.dtype and torch.equal(self.bits(i), other.bits(i))):
                return False
        return all(a is b or _same_layout(a, b) for a, b in zip(self.values, other.values, strict=True))


class FixedPoint(Explained):
    """``x_t = f(x_{t-1}, ..., x_{t-d})`` for ``t < T``, stopped at the first state that was there before.

    ``f`` is a deterministic function of the carried state and of values that are the same at every step. Where the
    state after step ``t`` equals, bit for bit, the state after step ``s < t``, all later states repeat those from ``s``
    on, so that every result of the full run is known. A repeat of period 1 is found at once, a longer one by R. P.
    Brent's algorithm (An improved Monte Carlo factorization algorithm, BIT 20, 1980, section 2) with one saved state.

    Where gradients are recorded, the steps up to the repeat are recorded and the ``n`` equal ones after it are not: with
    ``J`` their common Jacobian, the adjoint runs ``l <- J^T l`` and the operands' gradient is that of one step for the
    sum of all ``l``. It stops when ``l`` repeats or vanishes, as it does in an autoregressive inverse, where ``J`` is
    nilpotent. Loops with distances above 1 or stacked iterates run in full then.

    Args:
        loop: A loop of :attr:`fxjacobi.loops.Kind.FIXED_POINT`.

    Attributes:
        last: What the last call did.

    Raises:
        PassError: Something other than the state changes from step to step.
    """

    method = "fixed point"

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        if loop.kind is not Kind.FIXED_POINT:
            raise PassError(f"a {loop.kind.value} is no fixed-point iteration")
        self.loop = loop
        self.last: Solution | None = None
        self.reason = _REASON
        self._forms = Forms(lambda runner, device: FixedPointForm(loop, runner, device))
        self._carries = tuple(b for b in loop.bindings if isinstance(b, Carried))
        self._reach = max(b.distance for b in self._carries)
        self._keep_all = any(isinstance(r, Stacked) for r in loop.results)
        self._wanted = frozenset(r.step for r in loop.results if isinstance(r, Step))

    def forward(self, *operands: Any) -> tuple[Any, ...]:
        """Return the loop's results, and leave a :class:`Solution` in ``last``."""
        recorded = torch.is_grad_enabled() and any(isinstance(o, torch.Tensor) and o.requires_grad for o in operands)
        if recorded and (self._keep_all or self._reach > 1):
            self.last = Solution(self.loop.trip_count, Certificate.SEQUENTIAL)
            return tuple(self.loop(*operands))
        form = None if recorded else self._forms.of(operands)
        found = None if form is None else form(operands)
        if found is not None:
            results, self.last = found
            return results
        results = self._iterate(operands, recorded=recorded)
        if form is not None:
            form.adopt(operands, results)
        return results

    def _iterate(self, operands: Sequence[Any], *, recorded: bool) -> tuple[Any, ...]:
        outputs: dict[int, Sequence[Any]] = {}
        trip_count = self.loop.trip_count
        saved, saved_at = self._state(operands, outputs, 0), 0
        before = saved
        misses = next_check = 0
        step = 0
        while step < trip_count:
            outputs[step] = self._evaluate(operands, outputs, step)
            step += 1
            state = self._state(operands, outputs, step)
            if step < trip_count and step >= next_check:
                if state.equals(before):
                    if recorded:
                        return self._repeat_recorded(operands, outputs, step)
                    return self._repeat(operands, outputs, step - 1, step)
                if not recorded and state.equals(saved):
                    return self._repeat(operands, outputs, saved_at, step)
                misses += 1
                next_check = step + 1 + (0 if _on_cpu(state) else misses // _PATIENCE)
            if step & (step - 1) == 0:
                saved, saved_at = state, step
            before = state
            self._forget(outputs, step)
        self.last = Solution(trip_count, Certificate.SEQUENTIAL)
        return self.loop.collect(outputs)

    def _evaluate(self, operands: Sequence[Any], outputs: dict[int, Sequence[Any]], step: int) -> Sequence[Any]:
        body = self.loop.body.forward if torch.is_grad_enabled() else one_step(self.loop)
        values: Sequence[Any] = body(*self._arguments(operands, outputs, step))
        return values

    def _arguments(self, operands: Sequence[Any], outputs: dict[int, Sequence[Any]], step: int) -> list[Any]:
        arguments = []
        for binding in self.loop.bindings:
            if isinstance(binding, Carried):
                arguments.append(self._carried(binding, operands, outputs, step))
            else:
                arguments.append(operands[binding.operand])  # type: ignore[union-attr]
        return arguments

    @staticmethod
    def _carried(binding: Carried, operands: Sequence[Any], outputs: dict[int, Sequence[Any]], step: int) -> Any:
        before = step - binding.distance
        return outputs[before][binding.output] if before >= 0 else operands[binding.init[step]]

    def _state(self, operands: Sequence[Any], outputs: dict[int, Sequence[Any]], step: int) -> _State:
        """All that the steps from ``step`` on read, the newest values first."""
        return _State(
            [
                self._carried(binding, operands, outputs, step + ahead).detach()
                for binding in self._carries
                for ahead in reversed(range(binding.distance))
            ]
        )

    def _forget(self, outputs: dict[int, Sequence[Any]], step: int) -> None:
        """Drop what neither a later step nor a result reads."""
        old = step - self._reach - 1
        if not self._keep_all and old >= 0 and old not in self._wanted:
            del outputs[old]

    def _repeat(
        self, operands: Sequence[Any], outputs: dict[int, Sequence[Any]], start: int, step: int
    ) -> tuple[Any, ...]:
        """Return the results, knowing that the state before ``step`` is the state before ``start``."""
        period, sweeps = step - start, step
        shown = {t for t in self._wanted if t < step}  # steps whose tensors are results: no other result may be those
        for later in range(step, self.loop.trip_count) if self._keep_all else sorted(self._wanted):
            same = later if later < step else start + (later - start) % period
            if same not in outputs:
                # It was dropped; the cycle's next round makes it again.
                same += period
                while sweeps <= same:
                    outputs[sweeps] = self._evaluate(operands, outputs, sweeps)
                    sweeps += 1
            outputs[later] = outputs[same]
            if later in self._wanted and later != same:
                if same in shown:
                    outputs[later] = [placed_copy(v) if isinstance(v, torch.Tensor) else v for v in outputs[same]]
                shown.add(same)
        self.last = Solution(sweeps, Certificate.REPEATED if period == 1 else Certificate.CYCLED)
        return self.loop.collect(outputs)

    def _repeat_recorded(
        self, operands: Sequence[Any], outputs: dict[int, Sequence[Any]], step: int
    ) -> tuple[Any, ...]:
        """Return the results with gradients, knowing that the step before ``step`` left the state as it was."""
        now = step - 1
        for later in sorted(t for t in self._wanted if t >= step):
            values = [o.detach() for o in outputs[now]]
            arguments = self._arguments(operands, outputs, now + 1)
            outputs[later] = equal_steps(self.loop, later - now, arguments, values)
            now = later
        self.last = Solution(step, Certificate.REPEATED)
        return self.loop.collect(outputs)

    def extra_repr(self) -> str:
        """Show the trip count."""
        return f"at most {self.loop.trip_count} steps"


def _on_cpu(state: _State) -> bool:
    return all(value.device.type == "cpu" for value in state.values)
