"""Jacobi sweeps for a sampling loop that is proven causal: the same sample, in as many sweeps as it takes to settle.

    X^{k+1}[p_t] = v_t(G(X^k), noise_t)    for all t not yet final, at once;    X: (B, ...), T steps, K writes a step

One network evaluation serves all steps, at the ordinary run's shapes and strides, hence bit for bit. A sweep computes
the first equation that is not final from final values only, so it becomes final; and so do all up to the first whose
value changed. It stops when a sweep changes nothing, after at most ``T * K`` sweeps (arXiv 2002.03629, section 3.2;
the windowed form is its GS-Jacobi, section 4.3).

A guess that is not final may overflow, and ``0 * inf`` is NaN also where the ordinary run has 0. Non-finite guesses are
reset to what the array held before the loop. If a NaN shows up nevertheless where the proof relies on an exact zero,
the sweep is done again with all guesses reset, which is what the ordinary run sees at its next step; if that shows
it too, the rest is run in the ordinary order. What is not covered: an ordinary run in which such a NaN
comes about only at a step in the middle, from the unwritten part's initial values, and at no sweep.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn

from fxjacobi.array_programs import Programs, programs
from fxjacobi.causal_rules.interpreter import operand_value
from fxjacobi.causality import CausalityProof, Refusal, prove
from fxjacobi.certificate import Certificate, Solution
from fxjacobi.emit import dense_stride
from fxjacobi.loops import Invariant, Loop, Scanned, Stacked, Step, Table
from fxjacobi.ops import restride

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["JacobiWrites"]

_log = logging.getLogger(__name__)

_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class JacobiWrites(nn.Module):
    """A causal sampling loop solved by Jacobi sweeps; takes the loop's operands and returns its results.

    It runs the loop itself, in the ordinary order, where gradients are wanted.

    Args:
        proof: That each value written depends on values written before it only.
        window: Update only this many steps, from the first that is not final (GS-Jacobi); ``None``: all.
        restrided: Lay selections out as the ordinary run does (see :func:`fxjacobi.array_programs.programs`).
        batch: Turns the tail, a Map loop, into a module that runs all steps at once with the same bits.
        watched: The constants that the proof rests on, by name. When one was written to, the next call proves anew
            from the operands' values, and runs the loop in the ordinary order if that fails.

    Raises:
        ValueError: A window was asked for and the body holds Python values of its own at each step.
    """

    def __init__(
        self,
        proof: CausalityProof,
        *,
        window: int | None = None,
        restrided: bool = True,
        batch: Callable[[Loop], nn.Module] | None = None,
        watched: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        if window is not None and window < 1:
            raise ValueError(f"a window of {window} steps makes no progress")
        self.watched = dict(watched or {})
        self.batch = batch
        self.last: Solution | None = None
        self._adopt(proof, window, restrided)

    def _adopt(self, proof: CausalityProof, window: int | None, restrided: bool) -> None:
        """Build the programs of ``proof``, which holds for the constants as they are now."""
        structure = proof.structure
        self._versions = {name: tensor._version for name, tensor in self.watched.items()}
        self.proof = proof
        self.refused = False
        self.checked = False
        self.window = None if window is None or window >= structure.trip_count else window
        self.steps = self.window or structure.trip_count
        self.restrided = restrided
        self.parts: Programs = programs(proof, steps=self.steps, restrided=restrided)
        self.prelude, self.network = self.parts.prelude, self.parts.network
        self.tail: nn.Module = self.parts.tail if self.batch is None else self.batch(self.parts.tail)
        self.loop: Loop = structure.loop
        self.method = "jacobi" if self.window is None else f"jacobi (window of {self.window})"
        batched = getattr(self.tail, "reason", "")
        self.reason = "one evaluation of the network serves all steps" + (f"; tail: {batched}" if batched else "")
        self.proof_sentence = str(proof)
        device = structure.array_spec.device
        self._written = [write.positions.reshape(structure.trip_count, -1).to(device) for write in structure.writes]
        self._read = {
            one.node: structure.accesses[one.node].positions for one in self.parts.inputs if one.kind == "access"
        }
        # A read of an element before it is written sees what was there before the loop.
        self._early = {}
        for node, positions in self._read.items():
            source = structure.accesses[node].source
            self._read[node] = positions.to(device)
            if source in structure.versions:
                rank = proof.position_ranks.reshape(-1)[positions]
                clock = torch.arange(structure.trip_count) * len(self._written) + structure.versions[source]
                early = rank >= clock.reshape(-1, *[1] * (rank.dim() - 1))
                if bool(early.any()):
                    self._early[node] = early.to(device)

    # -- one call -------------------------------------------------------------------------------------------------

    def forward(self, *operands: Any) -> tuple[Any, ...]:
        """Solve for the array and return the loop's results."""
        if torch.is_grad_enabled() and any(isinstance(o, torch.Tensor) and o.requires_grad for o in operands):
            return self._in_order(operands)
        with torch.no_grad():
            if not self._still_proven(operands):
                return self._in_order(operands)
            solve = _Solve(self, operands)
            results = solve.run()
            if not self.checked and not solve.holds():
                # A kernel whose last bits depend on what it multiplies by zero: a Winograd convolution, for one.
                self.refused = True
                self.reason = "the network's bits change with positions that it does not depend on, so it runs in order"
                return self._in_order(operands)
            self.checked = True
            return results

    def _in_order(self, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        steps = self.loop.trip_count
        self.last = Solution(steps, Certificate.SEQUENTIAL, completed=steps)
        return tuple(self.loop(*operands))

    def _still_proven(self, operands: Sequence[Any]) -> bool:
        if all(tensor._version == self._versions[name] for name, tensor in self.watched.items()):
            return not self.refused
        invariants = {b.operand for b in self.loop.bindings if isinstance(b, Invariant)}
        values = [operand_value(o, f"operand {i}" if i in invariants else None) for i, o in enumerate(operands)]
        outcome = prove(self.loop, values)
        self.refused = isinstance(outcome, Refusal)
        if isinstance(outcome, Refusal):
            self._versions = {name: tensor._version for name, tensor in self.watched.items()}
            self.reason = f"a constant that the proof rested on was changed: {outcome}"
            return False
        self._adopt(outcome, self.window, self.restrided)
        return True

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"trip_count={self.loop.trip_count}, writes={len(self._written)}, window={self.window}"


class _Solve:
    """The state of one call."""

    def __init__(self, block: JacobiWrites, operands: tuple[Any, ...]) -> None:
        self.block = block
        self.structure = block.proof.structure
        self.operands = operands
        self.count = len(block._written)
        self.equations = self.structure.equations
        spec = self.structure.array_spec
        self.base = operands[self.structure.carry.init[0]].to(spec.dtype).reshape(-1)
        self.flat = self.base.clone()
        self.final = 0  # equations known to be final
        self.sweeps = 0
        self.prefixes: list[int] = []
        bindings = self.structure.bindings
        self.invariants = [operands[bindings[node].operand] for node in block.parts.invariants]
        *shared, flags = block.prelude(*self.invariants)
        self.shared = shared
        self.poisoned = _any_nan(flags)
        self.stacked = {one.node: self._stack(one.node) for one in block.parts.inputs if one.kind == "step"}

    def run(self) -> tuple[Any, ...]:
        ends: list[torch.Tensor] | None = None
        certificate = Certificate.EXACT_PREFIX
        while self.final < self.equations and not self.poisoned:
            ends, changed = self.sweep()
            certificate = Certificate.EXACT_PREFIX if changed else Certificate.REPEATED
        block = self.block
        done = self.final // self.count
        completed = 0
        if self.poisoned:
            completed, certificate = self.structure.trip_count - done, Certificate.NOT_FINITE
        block.last = Solution(
            self.sweeps, certificate, residual=0.0, prefixes=tuple(self.prefixes), completed=completed
        )
        if self._wants_ends():
            if not self.poisoned and (certificate is not Certificate.REPEATED or block.window is not None):
                ends = self._final_ends()
            if self.poisoned or ends is None:
                results: tuple[Any, ...] = block.loop(*self.operands)
                return results
            self._run_guards(ends)
            return self._results(ends)
        if self.poisoned:
            self._complete(done)
        return self._results([])

    # -- sweeps ---------------------------------------------------------------------------------------------------

    def sweep(self) -> tuple[list[torch.Tensor], bool]:
        """Evaluate all equations of the window once; return the tail's ends and whether anything changed."""
        start = self._window()
        ends, poisoned = self._evaluate(start)
        if poisoned and self._reset(self.final, only_non_finite=False):
            ends, poisoned = self._evaluate(start)
        if poisoned:
            self.poisoned = True
            return ends, True
        steps = self.block.steps
        changes = []
        news = []
        for k, positions in enumerate(self.block._written):
            here = positions[start : start + steps]
            new = self._flat_value(k, ends)
            news.append(new)
            changes.append((_bits(new) != _bits(self.flat[here])).reshape(steps, -1).any(1))
        changed = torch.stack(changes, 1).reshape(-1)  # in the order of the equations
        origin = start * self.count
        pending = changed[self.final - origin :].nonzero()
        end = origin + steps * self.count
        first = int(pending[0]) + self.final if len(pending) else end
        before = self.final
        self.final = min(first + 1, end)
        for k, new in enumerate(news):
            rows = _row(before, k, self.count) - start
            self.flat[self.block._written[k][start + rows : start + steps]] = new[rows:]
        if any(not bool(torch.isfinite(new).all()) for new in news if new.is_floating_point() or new.is_complex()):
            self._reset(self.final, only_non_finite=True)
        self.prefixes.append(self.final // self.count)
        return ends, first < end

    def _window(self) -> int:
        return min(self.final // self.count, self.structure.trip_count - self.block.steps)

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
            else:
                arguments.append(self._select(one.node, known, start, stop))
        return list(block.tail(*arguments)), _any_nan(flags)

    def _select(self, node: fx.Node, known: dict[fx.Node, Any], start: int, stop: int) -> torch.Tensor:
        source = known[self.structure.accesses[node].source]
        positions = self.block._read[node][start:stop]
        chosen: torch.Tensor = source.reshape(-1).index_select(0, positions.reshape(-1)).view(positions.shape)
        early = self.block._early.get(node)
        if early is not None:
            chosen = torch.where(early[start:stop], self.base[positions], chosen)
        return chosen

    def _reset(self, final: int, *, only_non_finite: bool) -> bool:
        """Put the base values in place of (non-finite) guesses past ``final``; return whether any differed."""
        any_reset = False
        for k, positions in enumerate(self.block._written):
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
            for k, positions in enumerate(self.block._written):
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
        for k, positions in enumerate(self.block._written):
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
