"""Jacobi sweeps of a sampling loop on a device: one captured graph a sweep, everything that it decides kept as tensors.

    ends_k = tail(network(X^k));    changed_e = any(bits(new_e) != bits(X^k[p_e]))    for equations e of the window
    final' = min(first changed e >= final, end) + 1;    X^{k+1}[p_e] = new_e where e >= final
    X^{k+1}[p_e] = X^0[p_e] where e >= final' and new_e is not finite

which is :mod:`fxjacobi.sampling` with masks in the place of slices: the exact prefix ``final`` is a tensor, so a sweep has
the same shapes whatever it finds. Once ``final`` has reached the last equation a sweep changes nothing, so the sweep
that is enqueued while the host still waits for the flags of the one before is harmless, and its ``ends`` are those of the
final array. A NaN where the proof relies on an exact zero puts all guesses back; if it shows again, the block runs
uncaptured, which completes in the ordinary order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from typing_extensions import override

from fxjacobi.certificate import Certificate, Solution
from fxjacobi.device.flags import read
from fxjacobi.device.form import DeviceForm, Session
from fxjacobi.device.operands import copied
from fxjacobi.device.runner import Captured, Late, Refused
from fxjacobi.device.state import bits_of
from fxjacobi.emit import dense_stride
from fxjacobi.ops import guard as guard_one
from fxjacobi.ops import guard_steps, restride
from fxjacobi.sampling_results import SamplingResults, put_back, stacked_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.device.operands import StaticOperands
    from fxjacobi.device.runner import GraphRunner
    from fxjacobi.sampling import JacobiWrites

__all__ = ["SamplingForm"]


class SamplingForm(DeviceForm):
    """See the module's docstring.

    Args:
        block: The sampling loop, with its proof and programs.
        runner: What captures.
        device: Where.
    """

    def __init__(self, block: JacobiWrites, runner: GraphRunner, device: torch.device) -> None:
        super().__init__(runner, device)
        self.block = block

    @override
    def describe(self) -> str:
        return "each sweep is a captured graph"

    @override
    def build(self, operands: StaticOperands) -> Session | Refused:
        session = _SamplingSession(self, operands)
        return session.capture() or session


class _SamplingSession(Session):
    def __init__(self, form: SamplingForm, operands: StaticOperands) -> None:
        super().__init__(operands)
        block = self.block = form.block
        self.form = form
        self.structure = block.proof.structure
        self.loop = block.loop
        self.count = len(block.written)
        self.total = self.structure.trip_count
        self.steps = block.steps
        self.equations = self.structure.equations
        spec = self.structure.array_spec
        device, size = form.device, torch.Size(spec.shape).numel()
        self.base = torch.empty(size, dtype=spec.dtype, device=device)
        self.flat = torch.empty_like(self.base)
        self.final = torch.zeros((), dtype=torch.int64, device=device)
        self.dead = torch.zeros((), dtype=torch.bool, device=device)
        self.offsets = torch.arange(self.steps, device=device)
        self.window_equations = torch.arange(self.steps * self.count, device=device)
        self.written = [positions.to(device) for positions in block.written]
        self.results = SamplingResults(self.structure, block.parts.ends)
        bindings = self.structure.bindings
        self.invariants = [operands.values[bindings[node].operand] for node in block.parts.invariants]
        self.shared: list[Any] = []
        self.stacked: dict[fx.Node, torch.Tensor] = {}
        self.reader = form.runner.reader(4, torch.int64, device)

    def capture(self) -> Refused | None:
        """Capture the start of a call and a sweep; return why that is not possible."""
        if self.steps != self.total and self.results.want_ends():
            return Refused("results of all steps are wanted of a window")
        if self.structure.states:
            return Refused("values that are carried beside the array")
        if self.steps != self.total and self.block.parts.literals:
            return Refused("a window over steps with Python values of their own")
        if any(guard.target is not guard_one for guard in self.structure.guards):
            return Refused("a guard that is not of one number a step")
        begin = self.form.runner.capture(self._begin, self.form.device)
        if isinstance(begin, Refused):
            return begin
        self.begin: Captured = begin
        begin.replay()  # what a sweep reads must be there before it is warmed up
        sweep = self.form.runner.capture(self._sweep, self.form.device)
        if isinstance(sweep, Refused):
            return sweep
        self.sweep: Captured = sweep
        return None

    # -- the two programs -----------------------------------------------------------------------------------------

    def _begin(self) -> Sequence[torch.Tensor]:
        """Put everything back to before the first sweep; run the prelude."""
        structure = self.structure
        array = self.operands.values[structure.carry.init[0]]
        self.base.copy_(array.to(structure.array_spec.dtype).reshape(-1))
        self.flat.copy_(self.base)
        *shared, flags = self.block.prelude(*self.invariants)
        nan = self._any_nan(flags)
        self.final.zero_()
        self.dead.copy_(nan)
        bindings = structure.bindings
        # The tensors of the capture itself are the last to be kept here: a sweep reads them by address.
        self.shared = shared
        self.stacked = {
            one.node: stacked_steps(bindings[one.node], self.operands.values)
            for one in self.block.parts.inputs
            if one.kind == "step"
        }
        return [self._flags(self.final, nan, nan, self.dead)]

    def _sweep(self) -> Sequence[torch.Tensor]:
        """Evaluate the window's equations once and take over what they say."""
        rows = None if self.steps == self.total else self._window() + self.offsets
        origin = 0 if rows is None else self._window() * self.count
        end = origin + self.steps * self.count
        ends, nan = self._evaluate(rows)
        index = self.window_equations + origin
        live = index >= self.final
        news, places, changes = [], [], []
        for k, written in enumerate(self.written):
            here = written if rows is None else written.index_select(0, rows)
            new = self.results.written(k, ends, self.flat.dtype).contiguous()
            news.append(new)
            places.append(here)
            changes.append((bits_of(new) != bits_of(self.flat[here])).reshape(self.steps, -1).any(1))
        changed = torch.stack(changes, 1).reshape(-1)
        first = torch.where(changed & live, index, end).amin()
        proceeds = ~nan & ~self.dead
        after = torch.where(proceeds, torch.minimum(first + 1, index[-1] + 1), self.final)
        resets: list[torch.Tensor] = []
        for k, (new, here) in enumerate(zip(news, places, strict=True)):
            equation = index[k :: self.count].unsqueeze(1)
            old, base = self.flat[here], self.base[here]
            guess = torch.where(proceeds & (equation >= self.final), new, old)
            kept = torch.where((equation >= after) & ~torch.isfinite(guess), base, guess)
            # A NaN in the network: all guesses go back, and the evaluation counts for nothing.
            value = torch.where(nan & (equation >= self.final), base, kept)
            resets.append((nan & (bits_of(value) != bits_of(old))).any())
            self.flat.scatter_(0, here.reshape(-1), value.reshape(-1))
        self.dead.logical_or_(nan & ~torch.stack(resets).any())
        self.final.copy_(after)
        return [self._flags(self.final, first < end, nan, self.dead), *ends]

    def _flags(self, *flags: torch.Tensor) -> torch.Tensor:
        return torch.stack([flag.to(torch.int64) for flag in flags])

    def _window(self) -> torch.Tensor:
        return torch.clamp(torch.div(self.final, self.count, rounding_mode="floor"), max=self.total - self.steps)

    def _evaluate(self, rows: torch.Tensor | None) -> tuple[list[torch.Tensor], torch.Tensor]:
        block = self.block
        array = self._array(self.flat)
        *sources, flags = block.network(array, *self.invariants, *self.shared)
        known: dict[fx.Node, Any] = dict(zip(block.parts.sources, sources, strict=True))
        known |= dict(zip(block.parts.shared, self.shared, strict=True))
        known |= dict(zip(block.parts.invariants, self.invariants, strict=True))
        for version in self.structure.versions:
            known[version] = array
        arguments = []
        for one in block.parts.inputs:
            if one.kind == "whole":
                arguments.append(known[one.node])
            elif one.kind == "step":
                stack = self.stacked[one.node]
                arguments.append(stack if rows is None else stack.index_select(0, rows))
            else:
                arguments.append(self._select(one.node, known, rows))
        return list(block.tail(*arguments)), self._any_nan(flags)

    def _select(self, node: fx.Node, known: dict[Any, Any], rows: torch.Tensor | None) -> torch.Tensor:
        source = known[self.structure.accesses[node].source]
        positions, early = self.block.selected[node].positions, self.block.early.get(node)
        if rows is not None:
            positions = positions.index_select(0, rows)
            early = early if early is None else early.index_select(0, rows)
        chosen: torch.Tensor = source.reshape(-1).index_select(0, positions.reshape(-1)).view(positions.shape)
        return chosen if early is None else torch.where(early, self.base[positions], chosen)

    def _any_nan(self, flags: Sequence[torch.Tensor]) -> torch.Tensor:
        if not flags:
            return torch.zeros((), dtype=torch.bool, device=self.form.device)
        return torch.stack([torch.isnan(flag) for flag in flags]).any()

    def _array(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the array, laid out as in the ordinary run."""
        spec = self.structure.array_spec
        value = flat.view(spec.shape)
        return value if spec.stride == dense_stride(spec.shape) else restride(value, spec.stride)

    # -- one call -------------------------------------------------------------------------------------------------

    @override
    def solve(self) -> tuple[tuple[Any, ...], Solution] | None:
        late = Late(self.reader)
        self.begin.replay()
        late.post(self.begin.outputs[0], False)
        flags, *ends = self.sweep.outputs
        sweeps = launched = final = 0
        prefixes: list[int] = []
        certificate = Certificate.EXACT_PREFIX
        dead = 0
        while final < self.equations and not dead:
            self.sweep.replay()
            launched += 1
            late.post(flags, True)
            while late.due() and final < self.equations and not dead:
                (final, changed, nan, dead), swept = late.take()
                sweeps += swept
                if swept and not nan:
                    prefixes.append(final // self.count)
                    certificate = Certificate.EXACT_PREFIX if changed else Certificate.REPEATED
        while late.pending:
            late.take()
        if dead:
            return None
        if self.results.want_ends() and (certificate is not Certificate.REPEATED):
            # The ends of all steps at the final array: a sweep more, which is often on its way already.
            if launched == sweeps:
                self.sweep.replay()
            sweeps += 1
        self._check_guards(ends)
        solution = Solution(sweeps, certificate, residual=0.0, prefixes=tuple(prefixes))
        return self.results.collect(ends, self._before, copied), solution

    def _check_guards(self, ends: Sequence[torch.Tensor]) -> None:
        """Check the guards of all steps, on values that are read all at once."""
        guards = self.structure.guards
        nodes = [guard.args[0] for guard in guards]
        values = read([ends[self.block.parts.ends.index(node)] for node in nodes])
        bindings = self.structure.bindings
        for guard, value in zip(guards, values, strict=True):
            expected = guard.args[1]
            wanted: Any = bindings[expected].values if isinstance(expected, fx.Node) else (expected,) * self.total
            guard_steps(value, wanted)

    def _before(self, equation: int) -> torch.Tensor:
        """Return the array as it was before ``equation``, in memory of its own."""
        flat = self.flat.clone()
        put_back(flat, self.base, self.written, equation)
        return self._array(flat)
