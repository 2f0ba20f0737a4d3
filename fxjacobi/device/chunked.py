"""Jacobi-GS on a device: a sweep through all chunks, its exchange of chunk ends and its updates are one captured graph.

    y_{c+1} <- F_c(y_c) for all chunks c at once;    moved_c = |y_c - old y_c| / tolerance

(:class:`fxjacobi.methods.chunked.Chunked`; arXiv 2002.03629, section 4.2). No chunk is dropped when it is final: a graph
has the same shapes at every sweep. How a solve runs is in :mod:`fxjacobi.device.solve_form`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from fxjacobi.batched_body import Strategy
from fxjacobi.constants import constant
from fxjacobi.device.fused import fused
from fxjacobi.device.norms import distance, leading_count
from fxjacobi.device.runner import Refused
from fxjacobi.device.solve_form import Progress, SolveForm, SolveSession
from fxjacobi.loops import Carried, Invariant, Literal
from fxjacobi.methods.chunked import Chunked
from fxjacobi.methods.settle import errors_along, floors, observed_gains
from fxjacobi.timing import interleaved, once

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxjacobi.batched_body import Layout
    from fxjacobi.certificate import Solution
    from fxjacobi.device.form import Session
    from fxjacobi.device.operands import StaticOperands
    from fxjacobi.device.runner import GraphRunner
    from fxjacobi.solved_loop import SolvedLoop
    from fxjacobi.system import Carry, States, System

__all__ = ["ChunkedForm"]

_OPERATIONS = 65536
"""Operations that the graph of one sweep may hold."""

_LONG_S = 2e-4
"""Seconds of a sweep from which on its flag is waited for: of two sweeps a third in vain is more than a round trip."""


class ChunkedForm(SolveForm):
    """See the module's docstring; for loops solved by :class:`fxjacobi.methods.chunked.Chunked`."""

    def __init__(self, solved: SolvedLoop, runner: GraphRunner, device: torch.device) -> None:
        super().__init__(solved, runner, device)
        method = solved.method
        assert isinstance(method, Chunked)
        reach = max(b.distance for b in self.loop.bindings if isinstance(b, Carried))
        self.length = min(self.loop.trip_count, max(method.chunk, reach))
        self.warm_up = method.warm_up
        self.fuses, self.fusing = solved.fuse, ""
        size = self.operations * self.length
        if self.refused is None and size > _OPERATIONS:
            self.refused = Refused(f"a sweep holds {size} operations, too many for one graph")
        elif self.refused is None and self.length == self.loop.trip_count:
            self.refused = Refused("one chunk is the ordinary order")

    @override
    def describe(self) -> str:
        return "; ".join(part for part in (super().describe(), self.fusing) if part)

    @override
    def build(self, operands: StaticOperands) -> Session | Refused:
        session = _ChunkedSession(self, operands)
        refused = session.capture()
        if refused is not None:
            return refused
        if self.fuses:
            self.fusing = session.fuse()
        session.lag = 0 if once(session.sweep.replay)[1] > _LONG_S else 1
        return session


class _Rows:
    """Steps of the loop that run side by side: row ``c`` of inner step ``j`` is step ``starts[c] + j``."""

    def __init__(self, system: System, starts: Sequence[int], length: int) -> None:
        self.starts, self.length = tuple(starts), length
        self.steps = [[start + inner for start in starts] for inner in range(length)]
        self.layout: Layout
        self.columns: list[Any] = []
        self.fused: Callable[..., Sequence[Any]] | None = None
        self._bindings = system.loop.bindings

    def gather(self, system: System, heads: Sequence[torch.Tensor]) -> None:
        """Lay out what every inner step reads beside the state."""
        whole = system.fixed(slice(None))
        example = list(whole)
        at = constant(self.steps, device=heads[0].device)
        for index, (binding, value) in enumerate(zip(self._bindings, whole, strict=True)):
            if isinstance(binding, Literal):
                example[index] = [binding.values[step] for step in self.steps[0]]
            elif system.body.mapped[index] and value is not None:
                example[index] = value[at[0]]
        position = 0
        for carry in system.carries:
            example[carry.placeholder] = heads[position]
            position += carry.depth
        layout = self.layout = system.body.layout(example, len(self.starts))
        self.columns = []
        for index, (binding, value) in enumerate(zip(self._bindings, whole, strict=True)):
            if value is None or isinstance(binding, Invariant):
                self.columns.append([value] * self.length)
            elif isinstance(binding, Literal):
                self.columns.append([layout.literal(index, [value[step] for step in row]) for row in self.steps])
            else:
                self.columns.append(list(layout.pack(value[at], leading=1).unbind(0)))

    def run(self, system: System, heads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the state's components and the other outputs that are results, each ``(rows, length, *shape)``."""
        layout = self.layout
        run = layout.run if self.fused is None else self.fused
        packed = [layout.pack(head) for head in heads]
        outputs = (*system.components, *system.others)
        histories: dict[int, list[torch.Tensor]] = {output: [] for output in outputs}
        for inner in range(self.length):
            arguments = [column[inner] for column in self.columns]
            offset = 0
            for carry in system.carries:
                history = histories[system.components[carry.component]]
                known = inner >= carry.distance
                arguments[carry.placeholder] = history[inner - carry.distance] if known else packed[offset + inner]
                offset += carry.depth
            found = run(*arguments)
            for output, history in histories.items():
                history.append(found[output])
        return [torch.stack([layout.unpack(v) for v in histories[o]], dim=1) for o in outputs]


class _ChunkedSession(SolveSession):
    def __init__(self, form: ChunkedForm, operands: StaticOperands) -> None:
        super().__init__(form, operands)
        length, total = form.length, self.total
        self.length, self.count = length, -(-total // length)
        self.starts = tuple(min(c * length, total - length) for c in range(self.count))
        self.rows = _Rows(self.system, self.starts, length)
        warm = max(self.system.reach, min(form.warm_up, total)) if form.warm_up else 0
        self.warm = _Rows(self.system, [max(0, s - warm) for s in self.starts[1:]], warm) if warm else None
        self.lag = 1
        self.warm_heads: list[torch.Tensor] = []
        self.heads = [torch.empty_like(head) for head in self._heads(self.system.base(), self.starts)]
        flags = 2 * self.count + (self.count - 1 if self.warm else 0)
        self.reader = form.runner.reader(flags, torch.float64, form.device)

    @override
    def begin_program(self) -> Sequence[torch.Tensor]:
        """Gather the inputs; the first chunk starts are the values before the loop, run through the warm-up."""
        system = self.system = self.make_system()
        base = system.base()
        heads = self._heads(base, self.starts)
        if self.warm is not None:
            self.warm_heads = self._heads(base, self.warm.starts)
            self.warm.gather(system, self.warm_heads)
            found = self.warm.run(system, self.warm_heads)
            heads = self._warmed(self.warm, found)
        first = torch.ones((), dtype=torch.int64, device=heads[0].device)
        for buffer, head in zip(self.heads, self._finite(heads, first), strict=True):
            buffer.copy_(head)
        self.rows.gather(system, self.heads)
        return [first]

    @override
    def sweep_program(self) -> Sequence[torch.Tensor]:
        system, contract = self.system, self.contract
        found = [self._assembled(value) for value in self.rows.run(system, self.heads)]
        states = tuple(found[: len(system.components)])
        heads = self._heads(states, self.starts)
        moved = torch.stack([distance((n,), (o,), contract) for n, o in zip(heads, self.heads, strict=True)]).amax(0)
        floor = torch.stack([floors((head,), contract) for head in heads]).amax(0)
        numbers = [moved, floor]
        if self.warm is not None:
            there = self._heads(states, self.warm.starts)
            off = [distance((n,), (o,), contract) for n, o in zip(there, self.warm_heads, strict=True)]
            numbers.append(torch.stack(off).amax(0))
        final = leading_count(moved <= floor)
        for buffer, head in zip(self.heads, self._finite(heads, final + 1), strict=True):
            buffer.copy_(head)
        return [torch.cat(numbers), *found]

    def _heads(self, states: States, starts: Sequence[int]) -> list[torch.Tensor]:
        """Return what each carry reads at steps ``start + j``, ``j < distance``, of each chunk."""
        return [
            _read(carry, states, [start + inner for start in starts])
            for carry in self.system.carries
            for inner in range(carry.depth)
        ]

    def fuse(self) -> str:
        """Capture the sweep with fused kernels too, keep the faster, and return what was measured."""
        arguments = [column[0] for column in self.rows.columns]
        position = 0
        for carry in self.system.carries:
            arguments[carry.placeholder] = self.rows.layout.pack(self.heads[position])
            position += carry.depth
        each = self.rows.layout.strategy is Strategy.EACH
        graph = None if each else self.rows.layout.graph(arguments)
        compiled = Refused("it has no graph") if graph is None else fused(graph, arguments)
        if isinstance(compiled, Refused):
            return f"not fused: {compiled.reason}"
        plain, found = self.sweep, self.found
        self.rows.fused = compiled
        captured = self.form.runner.capture(self.sweep_program, self.form.device)
        if isinstance(captured, Refused):
            self.rows.fused = None
            return f"not fused: {captured.reason}"
        usual_s, fused_s = interleaved([plain.replay, captured.replay], rounds=5)
        times = f"{fused_s * 1e3:.3f} ms a sweep fused by Inductor, {usual_s * 1e3:.3f} ms as recorded"
        if fused_s >= usual_s:
            self.rows.fused = None
            return f"not fused: {times}"
        self.sweep, self.found = captured, captured.outputs[1:]
        refused = self.capture_check()
        if refused is not None:
            self.sweep, self.found, self.rows.fused = plain, found, None
            return f"not fused: {refused.reason}"
        return times

    def _warmed(self, warm: _Rows, found: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the chunk starts that the warm-up came to, each chunk's from its own (the last two may overlap)."""
        heads: list[torch.Tensor] = []
        rows = constant(list(range(self.count - 1)), device=self.form.device)
        for carry in self.system.carries:
            for inner in range(carry.depth):
                ends = [s + inner - carry.distance - w for s, w in zip(self.starts[1:], warm.starts, strict=True)]
                later = found[carry.component][rows, constant(ends, device=self.form.device)]
                heads.append(torch.cat([carry.before[inner : inner + 1], later]))
        return heads

    def _finite(self, heads: Sequence[torch.Tensor], final: torch.Tensor) -> list[torch.Tensor]:
        """Replace guesses that are not finite, past the first ``final`` chunks, by the values before the loop."""
        replaced, position = [], 0
        base = self.system.base()
        chunk = torch.arange(self.count, device=final.device)
        for carry in self.system.carries:
            for _ in range(carry.depth):
                head = heads[position]
                open_ = (chunk >= final).reshape(-1, *[1] * (head.dim() - 1))
                replaced.append(torch.where(open_ & ~torch.isfinite(head), base[carry.component][: self.count], head))
                position += 1
        return replaced

    def _assembled(self, value: torch.Tensor) -> torch.Tensor:
        """Return ``(chunks, length, *shape)`` as a trajectory; the last chunk overlaps the one before."""
        overlap = self.count * self.length - self.total
        return torch.cat([value[:-1].flatten(0, 1), value[-1, overlap:]]) if overlap else value.flatten(0, 1)

    # -- one call -------------------------------------------------------------------------------------------------

    @override
    def solve(self) -> tuple[tuple[Any, ...], Solution] | None:
        return self.swept(_Progress(self), self.count, self.lag)


class _Progress(Progress):
    """The method's own decision; it goes on as long as it may."""

    def __init__(self, session: _ChunkedSession) -> None:
        self._session = session
        count = session.count
        self._updates = torch.zeros(count, dtype=torch.float64)
        self._gains = torch.full((count,), math.inf, dtype=torch.float64)
        self.prefixes = []
        self.done = self.stalled = False

    @override
    def add(self, numbers: Sequence[float]) -> None:
        """Take the updates of one sweep in."""
        session, count = self._session, self._session.count
        every = torch.tensor(numbers, dtype=torch.float64)
        moved, floor, off = every[:count], every[count : 2 * count], every[2 * count :]
        update = float(moved.amax())
        self._gains = observed_gains(moved, self._updates, self._gains, floor, (1,))
        if off.numel() and not self.prefixes:
            known = torch.isfinite(off) & (off > 4 * floor[1:])
            self._gains[1:] = torch.where(known, moved[1:] / off.clamp_min(1e-300), torch.full_like(off, math.inf))
        self._updates = moved
        found = errors_along(moved, self._gains, floor, (1,), kept=True, share=1.0, whole=update <= 1.0)
        if update <= 1.0:
            update = max(update, found.before)
        prefix = session.total if found.final == count else session.starts[found.final]
        self.prefixes.append(prefix)
        self.done = prefix == session.total or update <= 1.0


def _read(carry: Carry, states: States, steps: Sequence[int]) -> torch.Tensor:
    """Return what ``carry`` reads at each of ``steps``, ``(len(steps), *shape)``."""
    values = states[carry.component]
    read = values[constant([max(step - carry.distance, 0) for step in steps], device=values.device)]
    outside = [step for step in steps if step < carry.distance]
    if not outside:
        return read
    # Steps ascend: those that read from before the loop come first.
    return torch.cat([torch.stack([carry.before[step] for step in outside]), read[len(outside) :]])
