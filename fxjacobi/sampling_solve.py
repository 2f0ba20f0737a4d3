"""One call of a sampling block: sweeps over all equations that are not final, until the array is the ordinary run's."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from fxjacobi.certificate import Certificate, Solution
from fxjacobi.emit import dense_stride
from fxjacobi.loops import Scanned, Stacked, Step, Table
from fxjacobi.ops import restride

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.fewer_samples import FewerSamples
    from fxjacobi.sampling import JacobiWrites

__all__ = ["SamplingSolve"]

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

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
        spec = self.structure.array_spec
        self.base = operands[self.structure.carry.init[0]].to(spec.dtype).reshape(-1)
        self.flat = self.base.clone()
        self.final = 0  # equations known to be final
        self.sweeps = 0
        self.prefixes: list[int] = []
        self.active: list[int] = []
        self.states: dict[fx.Node, torch.Tensor] = {}
        """What each step handed on in the last sweep, ``(T, ...)``; right for steps that are final."""
        self.unsettled: torch.Tensor | None = None
        """Numbers of the samples that the last sweep changed, where it covered all that is not final."""
        self.proposed = False  # the array came out of sweeps of fewer samples, and no whole sweep has confirmed it
        self.poisoned = False
        self._prepare()

    def _prepare(self) -> None:
        """Compute what is the same at every sweep."""
        block, bindings = self.block, self.structure.bindings
        self.invariants = [self.operands[bindings[node].operand] for node in block.parts.invariants]
        *shared, flags = block.prelude(*self.invariants)
        self.shared = shared
        self.poisoned |= _any_nan(flags)
        self.stacked = {one.node: self._stack(one.node) for one in block.parts.inputs if one.kind == "step"}

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
        if self._wants_ends():
            if not self.poisoned and (certificate is not Certificate.REPEATED or block.window is not None):
                ends = self._final_ends()
            if self.poisoned or ends is None:
                results: tuple[Any, ...] = block.loop(*self.operands)
                return results
            self._run_guards(ends)
            return self._results(ends)
        if self.poisoned and self.structure.states:
            in_order: tuple[Any, ...] = block.loop(*self.operands)
            return in_order
        if self.poisoned:
            self._complete(done)
        return self._results([])

    # -- sweeps ---------------------------------------------------------------------------------------------------

    def settle(self, *, confirm: bool = True) -> tuple[list[torch.Tensor] | None, Certificate]:
        """Sweep until all equations are final (or a NaN shows up); return the last tail's ends, and why it stopped.

        With ``confirm``, what sweeps of fewer samples found is final only after a sweep of all that changes nothing.
        """
        ends: list[torch.Tensor] | None = None
        certificate = Certificate.EXACT_PREFIX
        dropping = True
        while self.final < self.equations and not self.poisoned:
            if dropping and self._settle_fewer():
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
        return ends, certificate

    def _guess(self) -> None:
        """Guess the sample of the call before, past what is final.

        The first sweep is from the array's own values, as in a cold start: it is what shows a NaN of the ordinary run.
        """
        previous = self.block.previous
        if previous is None or previous.shape != self.flat.shape or previous.device != self.flat.device:
            return
        for k, positions in enumerate(self.block.written):
            here = positions[_row(self.final, k, self.count) :]
            self.flat[here] = previous[here]
        self.unsettled = None

    def _settle_fewer(self) -> bool:
        """Solve for the samples that are not final alone, if they are few enough; return whether it was tried."""
        fewer = self.block.fewer
        if fewer is None or self.unsettled is None or len(self.unsettled) > fewer.size:
            return False
        if not fewer.checked:
            self._check_fewer(fewer)
            return False
        begun = time.perf_counter()
        kept = fewer.kept(self.unsettled)
        part = fewer.start(self, kept)
        part.settle(confirm=False)
        self.sweeps += part.sweeps
        self.prefixes += part.prefixes
        self.active += part.active
        self.unsettled = None
        if not part.poisoned:
            fewer.put(self.flat, kept, part.flat)
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
        start, final = part.flat.clone(), self.final
        whole_s = self._timed_sweep()
        part.sweep()
        if self.poisoned or part.poisoned:
            return  # neither says anything of the bits
        if not torch.equal(_bits(part.flat), _bits(fewer.get(self.flat, kept))):
            self.block.refuse_fewer(f"{fewer.size} samples alone do not have the bits that they have among all")
            return
        if self.block.measure:
            part.flat, part.final = start, final
            part_s = part._timed_sweep()
            if part_s > _WORTH * whole_s:
                times = f"{part_s * 1e3:.3f} ms, {whole_s * 1e3:.3f} ms for all"
                self.block.refuse_fewer(f"a sweep of {fewer.size} samples takes {times}")
                return
            fewer.whole_s = whole_s
        fewer.checked = True

    def _timed_sweep(self) -> float:
        begun = time.perf_counter()
        self.sweep()
        if self.flat.is_cuda:
            torch.cuda.synchronize(self.flat.device)
        return time.perf_counter() - begun

    def sweep(self) -> tuple[list[torch.Tensor], bool]:
        """Evaluate all equations of the window once; return the tail's ends and whether anything changed."""
        start = self._window()
        try:
            ends, poisoned = self._evaluate(start)
        except torch.OutOfMemoryError:
            self.block.halve_window()  # raises where a step by itself does not fit
            self._prepare()
            return self.sweep()
        if poisoned and self._reset(self.final, only_non_finite=False):
            ends, poisoned = self._evaluate(start)
        if poisoned:
            self.poisoned = True
            return ends, True
        self._keep_states(start, ends)
        steps = self.block.steps
        changes = []
        news = []
        unsettled = []
        for k, positions in enumerate(self.block.written):
            here = positions[start : start + steps]
            new = self._flat_value(k, ends)
            news.append(new)
            differs = _bits(new) != _bits(self.flat[here])
            differs = (differs.any(-1) if new.is_complex() else differs).reshape(steps, -1)
            changes.append(differs.any(1))
            if self.block.samples is not None:
                pending_rows = differs[max(0, _row(self.final, k, self.count) - start) :]
                unsettled.append(self.block.samples.numbers[k][pending_rows.any(0)])
        changed = torch.stack(changes, 1).reshape(-1)  # in the order of the equations
        origin = start * self.count
        pending = changed[self.final - origin :].nonzero()
        end = origin + steps * self.count
        first = int(pending[0]) + self.final if len(pending) else end
        before = self.final
        self.final = min(first + 1, end)
        for k, new in enumerate(news):
            rows = _row(before, k, self.count) - start
            self.flat[self.block.written[k][start + rows : start + steps]] = new[rows:]
        if any(not bool(torch.isfinite(new).all()) for new in news if new.is_floating_point() or new.is_complex()):
            self._reset(self.final, only_non_finite=True)
        self.prefixes.append(self.final // self.count)
        if self.block.samples is not None:
            self.active.append(self.block.samples.count)
            whole = start + steps == self.structure.trip_count
            self.unsettled = torch.cat(unsettled).unique() if whole else None
        return ends, first < end

    def _window(self) -> int:
        # What the last step that became final handed on may rest on the array before that sweep: start from the one before.
        first = max(0, self.final // self.count - int(bool(self.structure.states)))
        return min(first, self.structure.trip_count - self.block.steps)

    def _flat_value(self, k: int, ends: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return what the ``k``-th write of each step writes, a row a step, in the array's dtype."""
        write = self.structure.writes[k]
        value = ends[self.block.parts.ends.index(write.value)]
        # A value of fewer dimensions than the part it fills is broadcast, after its own leading step.
        missing = write.positions.dim() - value.dim()
        value = value.reshape(value.shape[0], *[1] * missing, *value.shape[1:])
        return value.expand(len(value), *write.positions.shape[1:]).reshape(len(value), -1).to(self.flat.dtype)

    def _evaluate(self, start: int) -> tuple[list[torch.Tensor], bool]:
        block = self.block
        array = self.array()
        *sources, flags = block.network(array, *self.invariants, *self.shared)
        self.sweeps += 1
        known: dict[fx.Node, Any] = dict(zip(block.parts.sources, sources, strict=True))
        known |= dict(zip(block.parts.shared, self.shared, strict=True))
        known |= dict(zip(block.parts.invariants, self.invariants, strict=True))
        for version in self.structure.versions:
            known[version] = array
        stop = start + block.steps
        arguments = []
        for one in block.parts.inputs:
            if one.kind == "whole":
                arguments.append(known[one.node])
            elif one.kind == "step":
                arguments.append(self.stacked[one.node][start:stop])
            elif one.kind == "state":
                arguments.append(self._state_before(one.node, start))
            else:
                arguments.append(self._select(one.node, known, start, stop))
        return list(block.tail_at(start)(*arguments)), _any_nan(flags)

    def _state_before(self, node: fx.Node, start: int) -> Any:
        """Return what the step before ``start`` handed on."""
        return self.states[node][start - 1] if start else self.operands[self.structure.states[node].init[0]]

    def _keep_states(self, start: int, ends: Sequence[torch.Tensor]) -> None:
        for node, binding in self.structure.states.items():
            handed = ends[self.block.parts.ends.index(self.structure.outputs[binding.output])]
            if node not in self.states:
                self.states[node] = handed.new_zeros(self.structure.trip_count, *handed.shape[1:])
            self.states[node][start : start + len(handed)] = handed

    def _select(self, node: fx.Node, known: dict[fx.Node, Any], start: int, stop: int) -> torch.Tensor:
        source = known[self.structure.accesses[node].source]
        positions = self.block.selected[node][start:stop]
        chosen: torch.Tensor = source.reshape(-1).index_select(0, positions.reshape(-1)).view(positions.shape)
        early = self.block.early.get(node)
        if early is not None:
            chosen = torch.where(early[start:stop], self.base[positions], chosen)
        return chosen

    def _reset(self, final: int, *, only_non_finite: bool) -> bool:
        """Put the base values in place of (non-finite) guesses past ``final``; return whether any differed."""
        any_reset = False
        for k, positions in enumerate(self.block.written):
            here = positions[_row(final, k, self.count) :]
            guess, base = self.flat[here], self.base[here]
            if only_non_finite:
                base = torch.where(torch.isfinite(guess), guess, base)
            if not torch.equal(_bits(guess), _bits(base)):
                any_reset = True
                self.flat[here] = base
        return any_reset

    def array(self, flat: torch.Tensor | None = None) -> torch.Tensor:
        """Return the array, laid out as in the ordinary run."""
        spec = self.structure.array_spec
        value = (self.flat if flat is None else flat).view(spec.shape)
        return value if spec.stride == dense_stride(spec.shape) else restride(value, spec.stride)

    def _stack(self, node: fx.Node) -> torch.Tensor:
        binding = self.structure.bindings[node]
        if isinstance(binding, Table):
            return torch.stack([self.operands[number] for number in binding.operands])
        assert isinstance(binding, Scanned)
        operand = self.operands[binding.operand]
        size = operand.shape[binding.dim]
        moved: torch.Tensor = operand.movedim(binding.dim, 0)
        indices = [index % size for index in binding.indices]
        if indices == list(range(len(indices))):
            return moved[: len(indices)]
        return moved.index_select(0, torch.tensor(indices, device=moved.device))

    def holds(self) -> bool:
        """Whether steps of the ordinary run, replayed in its own states, give the bits of the solution.

        With the array as it was before step p (a quarter, half and three quarters of the way), the values of all steps
        up to p must come out as they were found. A proof knows that ``0 * x`` adds nothing, not that a kernel sums so.
        """
        if self.poisoned:
            return True  # the rest was run in the ordinary order
        total, steps, sweeps, final = self.structure.trip_count, self.block.steps, self.sweeps, self.flat
        same = True
        for step in sorted({total // 4, total // 2, 3 * total // 4} - {0}):
            self.flat = final.clone()
            self._reset(step * self.count, only_non_finite=False)
            start = 0 if steps == total else min(step, total - steps)
            ends, _ = self._evaluate(start)
            for k, positions in enumerate(self.block.written):
                stop = step + 1 if k == 0 else step
                new = self._flat_value(k, ends)[: max(0, stop - start)]
                same &= torch.equal(_bits(new), _bits(final[positions[start : max(start, stop)]]))
        self.flat, self.sweeps = final, sweeps
        return same

    # -- the end --------------------------------------------------------------------------------------------------

    def _complete(self, done: int) -> None:
        """Run the steps from ``done`` on in the ordinary order."""
        self._reset(done * self.count, only_non_finite=False)
        loop, output = self.structure.loop, self.structure.carry.output
        value = self.array()
        operands = loop.align(self.operands)
        for step in range(done, self.structure.trip_count):
            before = {step - 1: {output: value}}
            arguments = loop.bind(operands, step, cast("Sequence[Sequence[Any]]", before))
            value = loop.body(*arguments)[output]
        self.flat = value.reshape(-1)

    def _wants_ends(self) -> bool:
        versions = self.structure.versions
        outputs = self.structure.outputs
        others = [r for r in self.structure.loop.results if outputs[r.output] not in versions]
        return bool(self.structure.guards or any(isinstance(outputs[r.output], fx.Node) for r in others))

    def _final_ends(self) -> list[torch.Tensor] | None:
        """Evaluate everything once more at the final array."""
        rows: list[list[torch.Tensor]] = []
        steps, total = self.block.steps, self.structure.trip_count
        for start in [*range(0, total - steps, steps), total - steps]:
            ends, poisoned = self._evaluate(start)
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
                        return ends[self.block.parts.ends.index(node)][step]
                    return bindings[node].values[step]

                assert callable(guard.target)
                guard.target(*fx.map_arg(guard.args, at))

    def _results(self, ends: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        results: list[Any] = []
        versions = self.structure.versions
        for result in self.structure.loop.results:
            node = self.structure.outputs[result.output]
            match result:
                case Step(_, step) if node in versions:
                    results.append(self._version(step, versions[node]))
                case Stacked(_) if node in versions:
                    total = self.structure.trip_count
                    results.append(torch.stack([self._version(step, versions[node]) for step in range(total)]))
                case Step(_, step):
                    value = ends[self.block.parts.ends.index(node)][step] if isinstance(node, fx.Node) else node
                    results.append(value)
                case Stacked(_):
                    results.append(ends[self.block.parts.ends.index(node)])
        return tuple(results)

    def _version(self, step: int, version: int) -> torch.Tensor:
        """Return the array as it was at ``step`` after ``version`` of its writes."""
        last = step * self.count + version
        if last >= self.equations:
            return self.array()
        flat = self.flat.clone()
        for k, positions in enumerate(self.block.written):
            here = positions[_row(last, k, self.count) :]
            flat[here] = self.base[here]
        return self.array(flat)


def _row(equation: int, k: int, count: int) -> int:
    """The first step whose ``k``-th write is equation ``equation`` or a later one."""
    return max(0, -(-(equation - k) // count))


def _bits(value: torch.Tensor) -> torch.Tensor:
    """Return the bits as integers, so that NaN equals itself and -0 differs from 0."""
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    if not value.is_floating_point():
        return value
    return value.contiguous().view(_INTEGER_OF_SIZE[value.element_size()])


def _any_nan(flags: Sequence[torch.Tensor]) -> bool:
    if not flags:
        return False
    return bool(torch.stack([torch.isnan(flag) for flag in flags]).any())
