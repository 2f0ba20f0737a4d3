"""The block of a fixed-point loop: it stops at the first exact repeat of its state.

    s_t = h(s_{t-1}, .., s_{t-D}),   t = 0 .. T-1,   with the same operands at every step.

``h`` is deterministic, so a state that comes back bit for bit comes back for ever: with ``s_t = s_{t0}`` and
``q = t - t0``, every later state is one of the ``q`` states in between, and the value of any step up to ``T - 1`` is
known without running it. No proof about ``h`` is needed. A period of one is seen at the next step; longer ones by
Brent's algorithm (R. P. Brent, BIT 20, 1980), which keeps a single earlier state, renewed at powers of two.

States are compared by their bits: ``-0.0`` and ``0.0`` are different states (``1 / x`` tells them apart), and a NaN
equals itself.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxjacobi.bits import same_bits
from fxjacobi.certificate import Certificate, Solution
from fxjacobi.loops import Carried, Loop, Stacked, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FixedPoint"]


class FixedPoint(nn.Module):
    """Takes the place of a loop of :attr:`fxjacobi.loops.Kind.FIXED_POINT`: same operands, same results, same bits.

    Args:
        loop: The loop. Its results may be values of any step, or all steps stacked.

    Attributes:
        last: What the last call did: ``sweeps`` counts evaluations of the body.
    """

    method = "stop early"

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self.loop = loop
        self.reason = f"nothing changes from step to step but the state, so its first repeat ends all {loop.trip_count}"
        self.last: Solution | None = None
        depth: dict[int, int] = {}
        for binding in loop.bindings:
            if isinstance(binding, Carried):
                depth[binding.output] = max(depth.get(binding.output, 0), binding.distance)
        self._carried = tuple((output, back) for output, d in depth.items() for back in range(1, d + 1))
        self._depth = max(depth.values())
        self._stacked = {r.output for r in loop.results if isinstance(r, Stacked)}
        self._steps = {r.step for r in loop.results if isinstance(r, Step)}

    def forward(self, *operands: Any) -> tuple[Any, ...]:
        """Run until the state repeats and return the loop's results.

        While gradients are recorded every step runs: the chain rule passes through all of them.
        """
        if torch.is_grad_enabled() and any(isinstance(o, torch.Tensor) and o.requires_grad for o in operands):
            self.last = Solution(self.loop.trip_count, Certificate.SEQUENTIAL)
            results: tuple[Any, ...] = self.loop(*operands)
            return results
        return self._solve(operands)

    def _solve(self, operands: Sequence[Any]) -> tuple[Any, ...]:
        trip_count = self.loop.trip_count
        window: deque[Sequence[Any]] = deque(maxlen=self._depth)
        kept: dict[int, Sequence[Any]] = {}  # outputs of the steps that a result names
        stacks: dict[int, list[Any]] = {output: [] for output in self._stacked}
        saved: tuple[int, list[Any], list[Sequence[Any]]] | None = None
        previous: list[Any] | None = None
        cycle: tuple[int, int, list[Sequence[Any]]] | None = None  # its start, its length, the outputs up to it
        step = -1
        for step in range(trip_count):
            before = list(window)
            outputs = self._step(operands, step, window)
            if step in self._steps:
                kept[step] = outputs
            for output, values in stacks.items():
                values.append(outputs[output])
            window.append(outputs)
            if len(window) < self._depth:
                continue
            state = [window[-back][output] for output, back in self._carried]
            if previous is not None and _same(state, previous):
                cycle = (step - 1, 1, before)
                break
            if saved is not None and _same(state, saved[1]):
                cycle = (saved[0], step - saved[0], saved[2])
                break
            if (step + 1) & step == 0:  # a power of two
                saved = (step, state, list(window))
            previous = state
        sweeps = step + 1
        if cycle is None:
            self.last = Solution(sweeps, Certificate.SEQUENTIAL, 0.0)
        else:
            sweeps += self._fill(operands, cycle, step, window[-1], kept)
            for values in stacks.values():
                start, length, _ = cycle
                values.extend(values[_equivalent(s, start, length)] for s in range(step + 1, trip_count))
            certificate = Certificate.REPEATED if cycle[1] == 1 else Certificate.CYCLED
            self.last = Solution(sweeps, certificate, 0.0)
        return tuple(
            kept[result.step][result.output] if isinstance(result, Step) else torch.stack(stacks[result.output])
            for result in self.loop.results
        )

    def _step(self, operands: Sequence[Any], step: int, window: deque[Sequence[Any]]) -> Sequence[Any]:
        arguments = []
        for binding in self.loop.bindings:
            if isinstance(binding, Carried):
                early = step < binding.distance
                arguments.append(
                    operands[binding.init[step]] if early else window[-binding.distance][binding.output]
                )
            else:
                arguments.append(operands[binding.operand])  # type: ignore[union-attr] # nothing else: a fixed point
        outputs: Sequence[Any] = self.loop.body(*arguments)
        return outputs

    def _fill(
        self,
        operands: Sequence[Any],
        cycle: tuple[int, int, list[Sequence[Any]]],
        step: int,
        outputs: Sequence[Any],
        kept: dict[int, Sequence[Any]],
    ) -> int:
        """Set ``kept`` for the named steps after ``step``; return how many steps had to be run again."""
        start, length, up_to_start = cycle
        wanted = {s: _equivalent(s, start, length) for s in self._steps if s > step}
        if not wanted:
            return 0
        known = {step: outputs}
        window = deque(up_to_start, maxlen=self._depth)
        again = 0
        if any(e != step for e in wanted.values()):
            for each in range(start + 1, max(e for e in wanted.values()) + 1):
                known[each] = self._step(operands, self._depth, window)
                window.append(known[each])
                again += 1
        for s, equivalent in wanted.items():
            kept[s] = known[equivalent]
        return again

    def extra_repr(self) -> str:
        return f"method={self.method!r}, trip_count={self.loop.trip_count}"


def _equivalent(step: int, start: int, length: int) -> int:
    """The step in ``start + 1 .. start + length`` whose outputs are those of ``step``."""
    return start + 1 + (step - start - 1) % length


def _same(state: Sequence[Any], other: Sequence[Any]) -> bool:
    return all(same_bits(a, b) for a, b in zip(state, other, strict=True))
