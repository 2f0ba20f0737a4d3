"""One call of a sampling block: sweeps over all equations that are not final, until the array is the ordinary run's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from fxjacobi.bits import same_bits
from fxjacobi.certificate import Certificate, Solution
from fxjacobi.sampling_array import SamplingArray
from fxjacobi.sampling_inputs import SamplingInputs
from fxjacobi.sampling_results import SamplingResults, first_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.fewer_samples import FewerSamples
    from fxjacobi.sampling import JacobiWrites

__all__ = ["SamplingSolve"]

_LAST = 32
"""Steps at the end whose samples are looked at first."""

_WORTH = 0.9
"""The share of a whole sweep's time that a sweep of fewer samples may take, to be worth it."""


class SamplingSolve:
    """The state of one call of a :class:`fxjacobi.sampling.JacobiWrites`."""

    def __init__(self, block: JacobiWrites, operands: tuple[Any, ...]) -> None:
        self.block = block
        self.structure = block.proof.structure
        self.operands = operands
        self.count = len(block.written)
        self.equations = self.structure.equations
        self.array = SamplingArray(self.structure, block.places, operands[self.structure.carry.init[0]])
        self.final = 0  # equations known to be final
        self.sweeps = 0
        self.prefixes: list[int] = []
        self.active: list[int] = []
        self.changed: list[int] = []
        """How many samples each sweep changed, where samples are told apart."""
        self.states: dict[fx.Node, torch.Tensor] = {}
        """What each step handed on in the last sweep, ``(T, ...)``; right for steps that are final."""
        self.unsettled: torch.Tensor | None = None
        """Numbers of the samples that the last sweep changed, where it covered all that is not final."""
        self.expected: int | None = block.fewer.gain.sweeps if block.fewer is not None else None
        """How many sweeps earlier solves took."""
        self.whole_s = 0.0
        """Seconds of the shortest sweep."""
        self.proposed = False  # the array came out of sweeps of fewer samples, and no whole sweep has confirmed it
        self.poisoned = False
        self._prepare()

    def _prepare(self) -> None:
        """Compute what is the same at every sweep."""
        self.results = SamplingResults(self.structure, self.block.parts.ends)
        self.inputs = SamplingInputs(self.block, self.operands, self.array.base)
        self.poisoned |= _any_nan(self.inputs.flags)

    def run(self) -> tuple[Any, ...]:
        """Solve, and return the loop's results."""
        ends, certificate = self.settle()
        block = self.block
        done = self.final // self.count
        completed = 0
        if self.poisoned:
            completed, certificate = self.structure.trip_count - done, Certificate.NOT_FINITE
        block.last = Solution(
            self.sweeps, certificate, residual=0.0, prefixes=tuple(self.prefixes), completed=completed,
            active=tuple(self.active),
        )  # fmt: skip
        if self.results.want_ends():
            if not self.poisoned and (certificate is not Certificate.REPEATED or block.window is not None):
                ends = self._final_ends()
            if self.poisoned or ends is None:
                results: tuple[Any, ...] = block.loop(*self.operands)
                return results
            self._run_guards(ends)
            return self.results.collect(ends, self.array.before)
        if self.poisoned and self.structure.states:
            in_order: tuple[Any, ...] = block.loop(*self.operands)
            return in_order
        if self.poisoned:
            self._complete(done)
        return self.results.collect([], self.array.before)

    # -- sweeps ---------------------------------------------------------------------------------------------------

    def settle(self, *, confirm: bool = True) -> tuple[list[torch.Tensor] | None, Certificate]:
        """Sweep until all equations are final (or a NaN shows up); return the last tail's ends, and why it stopped.

        With ``confirm``, what sweeps of fewer samples found is final only after a sweep of all that changes nothing.
        """
        ends: list[torch.Tensor] | None = None
        certificate = Certificate.EXACT_PREFIX
        dropping = True
        while self.final < self.equations and not self.poisoned:
            if dropping and self._settle_fewer(confirm=confirm):
                if not self.proposed:
                    dropping = False
                elif not confirm:
                    self.final = self.equations
                    break
            ends, changed = self.sweep()
            if self.sweeps == 1:
                self._guess()
            certificate = Certificate.EXACT_PREFIX if changed else Certificate.REPEATED
            if changed and self.proposed:
                self.block.refuse_fewer("a sweep of all samples differed from what sweeps of fewer had found")
                dropping = False
            self.proposed = False
        if self.block.fewer is not None and not self.poisoned:
            self.block.fewer.gain.record(self.changed, self.whole_s)
        return ends, certificate

    def _guess(self) -> None:
        """Guess the sample of the call before, past what is final.

        The first sweep is from the array's own values, as in a cold start: it is what shows a NaN of the ordinary run.
        """
        previous, flat = self.block.previous, self.array.flat
        if previous is None or previous.shape != flat.shape or previous.device != flat.device:
            return
        for k, places in enumerate(self.array.written):
            step = first_step(self.final, k, self.count)
            self.array.put(k, step, places.read(previous, step, self.structure.trip_count))
        self.unsettled = None

    def _settle_fewer(self, *, confirm: bool) -> bool:
        """Solve for the samples that are not final alone, if that gains; return whether it was tried."""
        fewer = self.block.fewer
        if fewer is None or self.unsettled is None or len(self.unsettled) > fewer.size:
            return False
        if not fewer.checked:
            if not self.block.measure or fewer.gain.worth_trying(self.changed, self.whole_s):
                self._check_fewer(fewer)
            return False
        left = None if self.expected is None else self.expected - self.sweeps
        if self.block.measure and not fewer.gain.worth_using(left, confirmed=confirm):
            return False
        begun = time.perf_counter()
        kept = fewer.kept(self.unsettled)
        part = fewer.start(self, kept)
        part.expected = left
        part.settle(confirm=False)
        self.sweeps += part.sweeps
        self.prefixes += part.prefixes
        self.active += part.active
        self.changed += part.changed
        self.unsettled = None
        if not part.poisoned:
            fewer.put(self.array, kept, part.array)
            self.proposed = True
        if self.block.measure:
            fewer.spent(time.perf_counter() - begun, part.sweeps)
            if fewer.wasteful:
                self.block.refuse_fewer(
                    "sweeps of fewer samples, and one of all to confirm, took longer than they saved"
                )
        return True

    def _check_fewer(self, fewer: FewerSamples) -> None:
        """Compare a sweep of fewer samples with one of all, from the same array: bits, and time."""
        assert self.unsettled is not None
        kept = fewer.kept(self.unsettled)
        part = fewer.start(self, kept)
        start, final = part.array.flat.clone(), self.final
        self.sweep()
        part.sweep()
        if self.poisoned or part.poisoned:
            return  # neither says anything of the bits
        if not same_bits(part.array.flat, fewer.get(self.array.flat, kept)):
            self.block.refuse_fewer(f"{fewer.size} samples alone do not have the bits that they have among all")
            return
        if self.block.measure:
            part.array.load(start)
            part.final = final
            part.sweep()
            if part.whole_s > _WORTH * self.whole_s:
                times = f"{part.whole_s * 1e3:.3f} ms, {self.whole_s * 1e3:.3f} ms for all"
                self.block.refuse_fewer(f"a sweep of {fewer.size} samples takes {times}")
                return
            fewer.gain.whole_s, fewer.gain.part_s = self.whole_s, part.whole_s
        fewer.checked = True

    def sweep(self) -> tuple[list[torch.Tensor], bool]:
        """Evaluate all equations of the window once; return the tail's ends and whether anything changed."""
        begun = time.perf_counter()
        start = self._window()
        try:
            ends, poisoned = self._evaluate(self.array, start)
        except torch.OutOfMemoryError:
            self.block.halve_window()  # raises where a step by itself does not fit
            self._prepare()
            return self.sweep()
        if poisoned and self.array.reset(self.final, only_non_finite=False):
            ends, poisoned = self._evaluate(self.array, start)
        if poisoned:
            self.poisoned = True
            return ends, True
        self._keep_states(start, ends)
        changed = self._adopt(start, ends)
        seconds = time.perf_counter() - begun
        self.whole_s = min(seconds, self.whole_s or seconds)
        return ends, changed

    def _adopt(self, start: int, ends: Sequence[torch.Tensor]) -> bool:
        """Take over what a sweep from step ``start`` on found; return whether it changed anything."""
        steps, block = self.block.steps, self.block
        end = (start + steps) * self.count
        first, finite = end, True
        telling = block.samples is not None and block.fewer is not None and start + steps == self.structure.trip_count
        touched: list[torch.Tensor] = []
        for k in range(self.count):
            pending = first_step(self.final, k, self.count)
            new = self.results.written(k, ends, self.array.flat.dtype)[pending - start :]
            if not new.numel():
                continue
            row = self.array.first_change(k, pending, new)
            if row is None:
                continue
            first = min(first, (pending + row) * self.count + k)
            if telling:
                touched.append(self._touched(k, pending + row, new[row:]))
            finite &= self.array.put(k, pending + row, new[row:])
        self.final = min(first + 1, end)
        if not finite:
            self.array.reset(self.final, only_non_finite=True)
        self.prefixes.append(self.final // self.count)
        if block.samples is not None:
            self.active.append(block.samples.count)
            self.unsettled = None
            if telling:  # or some of them, where these are too many to leave the others out
                self.unsettled = block.samples.union(touched)
            self.changed.append(block.samples.count if self.unsettled is None else len(self.unsettled))
        return first < end

    def _touched(self, k: int, step: int, new: torch.Tensor) -> torch.Tensor:
        """Return the samples that the ``k``-th writes ``new`` of the steps from ``step`` on change.

        The last steps settle last, so they say first that too many do to leave the others out; then it is some of them.
        """
        samples, fewer = self.block.samples, self.block.fewer
        assert samples is not None
        assert fewer is not None
        last = new[-_LAST:]
        found = samples.among(k, self.array.changed_elements(k, step + len(new) - len(last), last))
        if len(found) <= fewer.size:
            found = samples.among(k, self.array.changed_elements(k, step, new))
        return found

    def _window(self) -> int:
        # What the last step that became final handed on may rest on the array before that sweep: start from the one before.
        first = max(0, self.final // self.count - int(bool(self.structure.states)))
        return min(first, self.structure.trip_count - self.block.steps)

    def _evaluate(
        self, array: SamplingArray, start: int, *, final: int | None = None
    ) -> tuple[list[torch.Tensor], bool]:
        """Evaluate the equations of the window at ``array``, whose steps before that of equation ``final`` are as before."""
        value, inputs = array.value(), self.inputs
        *sources, flags = self.block.network(value, *inputs.invariants, *inputs.shared)
        self.sweeps += 1
        fresh = (self.final if final is None else final) // self.count  # and one before, which the last sweep changed
        arguments = inputs.at(value, sources, self.states, start, max(0, fresh - 1))
        return list(self.block.tail_at(start)(*arguments)), _any_nan(flags)

    def _keep_states(self, start: int, ends: Sequence[torch.Tensor]) -> None:
        for node, binding in self.structure.states.items():
            handed = self.results.end(self.structure.outputs[binding.output], ends)
            if node not in self.states:
                self.states[node] = handed.new_zeros(self.structure.trip_count, *handed.shape[1:])
            self.states[node][start : start + len(handed)] = handed

    def holds(self) -> bool:
        """Whether steps of the ordinary run, replayed in its own states, give the bits of the solution.

        With the array as it was before step p (a quarter, half and three quarters of the way), the values of all steps
        up to p must come out as they were found. A proof knows that ``0 * x`` adds nothing, not that a kernel sums so.
        """
        if self.poisoned:
            return True  # the rest was run in the ordinary order
        total, steps, sweeps = self.structure.trip_count, self.block.steps, self.sweeps
        same = True
        self.inputs.forget()
        for step in sorted({total // 4, total // 2, 3 * total // 4} - {0}):
            array = self.array.copied()
            array.reset(step * self.count, only_non_finite=False)
            start = 0 if steps == total else min(step, total - steps)
            ends, _ = self._evaluate(array, start, final=0)
            for k in range(self.count):
                stop = max(start, step + 1 if k == 0 else step)
                new = self.results.written(k, ends, array.flat.dtype)[: stop - start]
                same &= same_bits(new.contiguous(), self.array.rows[k][start:stop])
        self.sweeps = sweeps
        return same

    # -- the end --------------------------------------------------------------------------------------------------

    def _complete(self, done: int) -> None:
        """Run the steps from ``done`` on in the ordinary order."""
        self.array.reset(done * self.count, only_non_finite=False)
        loop, output = self.structure.loop, self.structure.carry.output
        value = self.array.value()
        operands = loop.align(self.operands)
        for step in range(done, self.structure.trip_count):
            before = {step - 1: {output: value}}
            arguments = loop.bind(operands, step, cast("Sequence[Sequence[Any]]", before))
            value = loop.body(*arguments)[output]
        self.array.load(value.reshape(-1))

    def _final_ends(self) -> list[torch.Tensor] | None:
        """Evaluate everything once more at the final array."""
        rows: list[list[torch.Tensor]] = []
        steps, total = self.block.steps, self.structure.trip_count
        for start in [*range(0, total - steps, steps), total - steps]:
            ends, poisoned = self._evaluate(self.array, start, final=0)
            if poisoned:
                self.poisoned = True
                return None
            have = sum(len(part) for part in rows[0]) if rows else 0
            fresh = [end[have - start :] for end in ends]
            rows = [[*old, new] for old, new in zip(rows or [[] for _ in ends], fresh, strict=True)]
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in rows]

    def _run_guards(self, ends: Sequence[torch.Tensor]) -> None:
        bindings = self.structure.bindings
        for guard in self.structure.guards:
            for step in range(self.structure.trip_count):

                def at(node: fx.Node, step: int = step) -> Any:
                    if node in self.block.parts.ends:
                        return self.results.end(node, ends)[step]
                    return bindings[node].values[step]

                assert callable(guard.target)
                guard.target(*fx.map_arg(guard.args, at))


def _any_nan(flags: Sequence[torch.Tensor]) -> bool:
    return any(flag != flag for flag in torch.stack(tuple(flags)).tolist()) if flags else False
