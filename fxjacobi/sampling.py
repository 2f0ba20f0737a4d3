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
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxjacobi.array_places import Places, places
from fxjacobi.array_programs import Programs, programs
from fxjacobi.causal_rules.interpreter import operand_value
from fxjacobi.causality import CausalityProof, Refusal, prove
from fxjacobi.certificate import Certificate, Solution
from fxjacobi.device.form import Explained, Forms
from fxjacobi.device.sampling import SamplingForm
from fxjacobi.emit import size_in_bytes
from fxjacobi.fewer_samples import FewerSamples, Samples, fewer_samples
from fxjacobi.graph import spec_of
from fxjacobi.loops import Invariant, Literal, Loop
from fxjacobi.remembered import Remembered
from fxjacobi.sampling_solve import SamplingSolve
from fxjacobi.tail_layouts import Repeated

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import fx

__all__ = ["JacobiWrites"]

_log = logging.getLogger(__name__)


class JacobiWrites(Explained):
    """A causal sampling loop solved by Jacobi sweeps; takes the loop's operands and returns its results.

    It runs the loop itself, in the ordinary order, where gradients are wanted.

    Args:
        proof: That each value written depends on values written before it only.
        window: Update only this many steps, from the first that is not final (GS-Jacobi); ``None``: all.
        restrided: Lay selections out as the ordinary run does (see :func:`fxjacobi.array_programs.programs`).
        batch: Turns the tail, a Map loop, into a module that runs all steps at once with the same bits.
        watched: The constants that the proof rests on, by name. When the values of one changed, the next call proves
            anew from the operands' values, and runs the loop in the ordinary order if that fails.
        drop: Leave samples of a batch that are final out of later sweeps (see :mod:`fxjacobi.fewer_samples`).
        measure: Do so only where it is measured to be faster.
        memory_limit: Bytes that the tail of one sweep may allocate; the window is made to fit.

    Attributes:
        warm_start: Guess the sample of the call before, after a first sweep from what the array held before the loop.
        previous: That sample, flat.

    Raises:
        ValueError: The window has no step.
    """

    def __init__(
        self,
        proof: CausalityProof,
        *,
        window: int | None = None,
        restrided: bool = True,
        batch: Callable[[Loop], nn.Module] | None = None,
        watched: Mapping[str, torch.Tensor] | None = None,
        drop: bool = True,
        measure: bool = True,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__()
        if window is not None and window < 1:
            raise ValueError(f"a window of {window} steps makes no progress")
        self.watched = dict(watched or {})
        self.batch = batch
        self.drop = drop
        self.measure = measure
        self.memory_limit = memory_limit
        self.last: Solution | None = None
        self.warm_start = False
        self.previous: torch.Tensor | None = None
        self._read: dict[str, int] = {}
        self._remembered = Remembered(self.watched)
        self._adopt(proof, window, restrided)

    def _adopt(self, proof: CausalityProof, window: int | None, restrided: bool) -> None:
        """Build the programs of ``proof``."""
        begun = time.perf_counter()
        structure = proof.structure
        self.proof = proof
        self.refused = False
        self.checked = False
        self.restrided = restrided
        self._repeated = Repeated(structure)
        self.loop: Loop = structure.loop
        self.proof_sentence = str(proof)
        self.fewer: FewerSamples | None = None
        self.samples: Samples | None = None
        self._dropping = ""
        device = structure.array_spec.device
        self.written = [write.positions.reshape(structure.trip_count, -1).to(device) for write in structure.writes]
        self.places = [places(positions) for positions in self.written]
        self._set_window(window, self._fitting())
        if self.drop:
            build_s = time.perf_counter() - begun
            self.samples, self.fewer, self._dropping = fewer_samples(proof, self.written, self._smaller, build_s)
        if self.fewer is not None:
            self._dropping = f"samples that are final are left out once {self.fewer.size} are not"
        self._explain()

    def _set_window(self, window: int | None, fitting: int | None = None) -> None:
        """Build the programs for sweeps of ``window`` steps (``None``: all), or of ``fitting`` steps if these are fewer."""
        structure = self.proof.structure
        steps = min(structure.trip_count, window or structure.trip_count, fitting or structure.trip_count)
        if structure.states:  # a window of one step, begun a step early, would make no progress
            steps = min(structure.trip_count, max(steps, 2))
        self.window = None if steps == structure.trip_count else steps
        self.steps = steps
        self.parts: Programs = programs(self.proof, steps=steps, restrided=self.restrided)
        self.prelude, self.network = self.parts.prelude, self.parts.network
        # A batched tail holds the Python values of its steps, so that one that slides cannot be.
        batched = self.batch is not None and not (self.window and self.parts.literals)
        self.tail: nn.Module = self.batch(self.parts.tail) if batched and self.batch else self.parts.tail
        self.method = "jacobi" if self.window is None else f"jacobi (window of {self.window})"
        self._forms = Forms(lambda runner, device: SamplingForm(self, runner, device))
        self.selected: dict[fx.Node, Places] = {}
        # A read of an element before it is written sees what was there before the loop.
        self.early: dict[fx.Node, torch.Tensor] = {}
        device = structure.array_spec.device
        for node in (one.node for one in self.parts.inputs if one.kind == "access"):
            source, positions = structure.accesses[node].source, structure.accesses[node].positions
            self.selected[node] = places(positions.to(device))
            if source in structure.versions:
                rank = self.proof.position_ranks.reshape(-1)[positions]
                clock = torch.arange(structure.trip_count) * len(self.written) + structure.versions[source]
                early = rank >= clock.reshape(-1, *[1] * (rank.dim() - 1))
                if bool(early.any()):
                    self.early[node] = early.to(device)
        self._explain()

    def tail_at(self, start: int) -> nn.Module:
        """Return the tail of the steps of a window that starts at ``start``."""
        if self.window is None or not self.parts.literals:
            return self.tail
        bindings = list(self.parts.tail.bindings)
        for place, values in self.parts.literals.items():
            bindings[place] = Literal(values[start : start + self.steps])
        return Loop(self.parts.tail.body, self.steps, bindings, self.parts.tail.results)

    def _fitting(self) -> int | None:
        """How many steps' tails fit into the limit of memory; at least one."""
        if self.memory_limit is None:
            return None
        structure = self.proof.structure
        step = sum(size_in_bytes(spec_of(node)) for node in (*structure.tail, *structure.accesses))
        return max(1, self.memory_limit // max(step, 1))

    def _explain(self) -> None:
        batched = getattr(self.tail, "reason", "")
        tail = f"tail: {batched}" if batched else ""
        self.reason = "; ".join(
            part for part in ("one evaluation of the network serves all steps", tail, self._dropping) if part
        )

    def _smaller(self, proof: CausalityProof) -> JacobiWrites:
        """Return a block for fewer samples."""
        return JacobiWrites(
            proof,
            window=self.window,
            restrided=self.restrided,
            batch=self.batch,
            measure=self.measure,
            memory_limit=self.memory_limit,
        )

    def halve_window(self) -> None:
        """Update half as many steps at a time from now on: a sweep did not fit into memory.

        Raises:
            torch.OutOfMemoryError: One step by itself does not fit.
        """
        if self.steps == 1 + bool(self.proof.structure.states):
            raise torch.OutOfMemoryError("one step of a sampling loop does not fit into memory")
        self._set_window(-(-self.steps // 2))

    def refuse_fewer(self, reason: str) -> None:
        """Run all samples at every sweep from now on."""
        self.fewer = None
        self._dropping = f"each sweep runs all samples: {reason}"
        _log.info("%s", self._dropping)
        self._explain()

    # -- one call -------------------------------------------------------------------------------------------------

    def forward(self, *operands: Any) -> tuple[Any, ...]:
        """Solve for the array and return the loop's results."""
        if torch.is_grad_enabled() and any(isinstance(o, torch.Tensor) and o.requires_grad for o in operands):
            return self._in_order(operands)
        with torch.no_grad():
            if not self._still_proven(operands):
                return self._in_order(operands)
            dense = self._repeated.missing(operands) if self.restrided else None
            if dense is not None:
                self.reason = f"runs in order where {dense} is not expanded, as it was when the loop was recorded"
                return self._in_order(operands)
            form = self._forms.of(operands)
            captured = None if form is None else form(operands)
            if captured is not None:
                results, self.last = captured
                return results
            solve = SamplingSolve(self, operands)
            results = solve.run()
            if not self.checked and not solve.holds():
                # A kernel whose last bits depend on what it multiplies by zero: a Winograd convolution, for one.
                self.refused = True
                self.reason = "the network's bits change with positions that it does not depend on, so it runs in order"
                return self._in_order(operands)
            self.checked = True
            self.previous = solve.array.flat.clone() if self.warm_start and not solve.poisoned else None
            if form is not None:
                form.adopt(operands, results)
            return results

    def forget(self) -> None:
        """Start the next call without the sample of the call before."""
        self.previous = None

    def _in_order(self, operands: tuple[Any, ...]) -> tuple[Any, ...]:
        steps = self.loop.trip_count
        self.last = Solution(steps, Certificate.SEQUENTIAL, completed=steps)
        return tuple(self.loop(*operands))

    def _still_proven(self, operands: Sequence[Any]) -> bool:
        if self._remembered.unchanged(self._rests_on(operands)):
            return not self.refused
        invariants = {b.operand: f"operand {b.operand}" for b in self.loop.bindings if isinstance(b, Invariant)}
        outcome = prove(self.loop, [operand_value(o, invariants.get(i)) for i, o in enumerate(operands)])
        self.refused = isinstance(outcome, Refusal)
        # An operand may be an argument of the call, another at the next one: a proof that read it holds for its values.
        reads = frozenset[str]() if isinstance(outcome, Refusal) else outcome.reads
        self._read = {name: operand for operand, name in invariants.items() if name in reads}
        self._remembered = Remembered(self._rests_on(operands))
        if isinstance(outcome, Refusal):
            self.reason = f"a constant that the proof rested on was changed: {outcome}"
            return False
        self._adopt(outcome, self.window, self.restrided)
        return True

    def _rests_on(self, operands: Sequence[Any]) -> dict[str, torch.Tensor]:
        return self.watched | {name: operands[operand] for name, operand in self._read.items()}

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"trip_count={self.loop.trip_count}, writes={len(self.written)}, window={self.window}"
