"""Jacobi-GS on a device: a sweep through all chunks, its exchange of chunk ends and its updates are one captured graph.

    y_{c+1} <- F_c(y_c) for all chunks c at once;    moved_c = |y_c - old y_c| / tolerance

(:class:`fxjacobi.methods.chunked.Chunked`; arXiv 2002.03629, section 4.2). The updates, a number a chunk, travel to the host,
which decides as the method does, one sweep late; meanwhile the next sweep runs, and leaves nothing worse. The equations
of the result are then evaluated all at once, in a graph too, and one read says whether each holds within the tolerance.
Where one does not, the block is solved uncaptured, which completes in the ordinary order.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from fxjacobi.certificate import Certificate, Solution
from fxjacobi.constants import constant
from fxjacobi.device.form import DeviceForm, Session
from fxjacobi.device.hazards import indexes_by_guess
from fxjacobi.device.norms import agreement, distance, leading_count, relative
from fxjacobi.device.runner import Captured, Late, Refused
from fxjacobi.loops import Carried, Invariant, Literal
from fxjacobi.methods.chunked import Chunked
from fxjacobi.methods.guess import Base
from fxjacobi.methods.method import Contract
from fxjacobi.methods.settle import errors_to_come, floors, leading, observed_gains
from fxjacobi.system import System

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.batched_body import Layout
    from fxjacobi.device.operands import StaticOperands
    from fxjacobi.device.runner import GraphRunner
    from fxjacobi.solved_loop import SolvedLoop
    from fxjacobi.system import Carry, States

__all__ = ["ChunkedForm"]

_OPERATIONS = 65536
"""Operations that the graph of one sweep may hold."""


class ChunkedForm(DeviceForm):
    """See the module's docstring.

    Args:
        solved: A loop solved by :class:`fxjacobi.methods.chunked.Chunked` within a tolerance.
        runner: What captures.
        device: Where.
    """

    def __init__(self, solved: SolvedLoop, runner: GraphRunner, device: torch.device) -> None:
        # Sweeps are counted one later than uncaptured, so iterates differ within the tolerance: the check decides.
        super().__init__(runner, device, compare=False)
        loop = self.loop = solved.loop
        self.contract = solved.contract
        self.guess, self.memory_limit = solved.guess, solved.memory_limit
        method = solved.method
        placeholders = [n for n in loop.body.graph.nodes if n.op == "placeholder"]
        carried = [n for n, b in zip(placeholders, loop.bindings, strict=True) if isinstance(b, Carried)]
        hazard = indexes_by_guess(loop.body, carried)
        if not isinstance(method, Chunked) or solved.batch is not None or self.contract.exact:
            self.refused = Refused("only chunks within a tolerance have captured sweeps")
        elif not isinstance(solved.guess, Base) or solved.warm_start:
            self.refused = Refused("its sweeps start from another guess than the values before the loop")
        elif hazard is not None:
            self.refused = Refused(hazard)
        else:
            reach = max(b.distance for b in loop.bindings if isinstance(b, Carried))
            self.length = min(loop.trip_count, max(method.chunk, reach))
            self.warm_up = method.warm_up
            size = sum(node.op.startswith("call") for node in loop.body.graph.nodes)
            if size * self.length > _OPERATIONS:
                self.refused = Refused(f"a sweep holds {size * self.length} operations, too many for one graph")

    @override
    def describe(self) -> str:
        return "each sweep is a captured graph"

    @override
    def build(self, operands: StaticOperands) -> Session | Refused:
        session = _ChunkedSession(self, operands)
        return session.capture() or session


class _Rows:
    """Steps of the loop that run side by side: row ``c`` of inner step ``j`` is step ``starts[c] + j``."""

    def __init__(self, system: System, starts: Sequence[int], length: int) -> None:
        self.starts, self.length = tuple(starts), length
        self.steps = [[start + inner for start in starts] for inner in range(length)]
        self.layout: Layout
        self.columns: list[Any] = []
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
            found = layout.run(*arguments)
            for output, history in histories.items():
                history.append(found[output])
        return [torch.stack([layout.unpack(v) for v in histories[o]], dim=1) for o in outputs]


class _ChunkedSession(Session):
    def __init__(self, form: ChunkedForm, operands: StaticOperands) -> None:
        super().__init__(operands)
        self.form, self.contract = form, form.contract
        length, total = form.length, form.loop.trip_count
        self.count, self.total = -(-total // length), total
        self.starts = tuple(min(c * length, total - length) for c in range(self.count))
        self.system = self._system()
        self.rows = _Rows(self.system, self.starts, length)
        reach = self.system.reach
        warm = max(reach, min(form.warm_up, self.starts[1])) if form.warm_up and self.count > 1 else 0
        self.warm = _Rows(self.system, [max(0, s - warm) for s in self.starts[1:]], warm) if warm else None
        self.warm_heads: list[torch.Tensor] = []
        self.heads = [torch.empty_like(head) for head in self._heads(self.system.base(), self.starts)]
        self.flags = 2 * self.count + (self.count - 1 if self.warm else 0)
        self.reader = form.runner.reader(self.flags, torch.float64, form.device)
        self.verdict = form.runner.reader(2, torch.float64, form.device)

    def _system(self) -> System:
        return System(self.form.loop, self.operands.values, memory_limit=self.form.memory_limit)

    def capture(self) -> Refused | None:
        """Capture the start of a call, a sweep and the check."""
        if self.count < 2:
            return Refused("one chunk is the ordinary order")
        if self.system.rows_limit < self.total:
            return Refused("its steps do not fit in the memory allowed, all at once")
        self._begin()
        for _ in range(2):  # ways of batching are chosen and traced before anything is captured
            self.found = tuple(self._sweep()[1:])
            self._check()
        found: list[Captured] = []
        for program in (self._begin, self._sweep, self._check):
            captured = self.form.runner.capture(program, self.form.device)
            if isinstance(captured, Refused):
                return captured
            captured.replay()  # what the next program reads must be there before it is warmed up
            found.append(captured)
            if program == self._sweep:
                self.found = captured.outputs[1:]
        self.begin, self.sweep, self.check = found
        return None

    # -- the programs ---------------------------------------------------------------------------------------------

    def _begin(self) -> Sequence[torch.Tensor]:
        """Gather the inputs; the first chunk starts are the values before the loop, run through the warm-up."""
        system = self.system = self._system()
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

    def _sweep(self) -> Sequence[torch.Tensor]:
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

    def _check(self) -> Sequence[torch.Tensor]:
        """Evaluate every equation at the trajectory that the last sweep left."""
        system, every = self.system, Contract(rtol=1.0)
        states = tuple(self.found[: len(system.components)])
        outputs = system.evaluate(states)
        values = system.pick(outputs)
        floor = floors(values, self.contract)
        holds = (distance(values, states, self.contract) <= torch.maximum(floor, torch.ones_like(floor))).all()
        for step in sorted({0, self.total // 2, self.total - 1}):
            alone = system.pick(system.alone(states, step))
            holds = holds & agreement(alone, tuple(value[step] for value in values))
        return [torch.stack([holds.double(), relative(values, states, every)]), *(outputs[o] for o in system.others)]

    def _heads(self, states: States, starts: Sequence[int]) -> list[torch.Tensor]:
        """Return what each carry reads at steps ``start + j``, ``j < distance``, of each chunk."""
        return [
            _read(carry, states, [start + inner for start in starts])
            for carry in self.system.carries
            for inner in range(carry.depth)
        ]

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
        overlap = self.count * self.form.length - self.total
        return torch.cat([value[:-1].flatten(0, 1), value[-1, overlap:]]) if overlap else value.flatten(0, 1)

    # -- one call -------------------------------------------------------------------------------------------------

    @override
    def solve(self) -> tuple[tuple[Any, ...], Solution] | None:
        late = Late(self.reader)
        progress = _Progress(self)
        self.begin.replay()
        bound = self.count if self.contract.max_sweeps is None else min(self.contract.max_sweeps, self.count)
        launched = 0
        while launched < bound and not progress.done:
            self.sweep.replay()
            launched += 1
            late.post(self.sweep.outputs[0])
            if late.due():
                progress.add(late.take()[0])
        while late.pending:
            numbers, _ = late.take()
            if not progress.done:
                progress.add(numbers)
        if not progress.done:
            return None
        self.check.replay()
        self.verdict.post(self.check.outputs[0])
        holds, residual = self.verdict.take()
        if not holds:
            return None
        components = len(self.system.components)
        states = tuple(self.found[:components])
        others = dict(zip(self.system.others, self.check.outputs[1:], strict=True))
        results = self.system.results(states, others)
        prefixes = tuple(progress.prefixes)
        own = tuple(r.clone() if isinstance(r, torch.Tensor) else r for r in results)
        return own, Solution(len(prefixes), Certificate.RESIDUAL, residual, prefixes)


class _Progress:
    """The method's own decision, from the numbers of each sweep."""

    def __init__(self, session: _ChunkedSession) -> None:
        self._session = session
        count = session.count
        self._updates = torch.zeros(count, dtype=torch.float64)
        self._gains = torch.full((count,), math.inf, dtype=torch.float64)
        self.prefixes: list[int] = []
        self.done = False

    def add(self, numbers: Sequence[float]) -> None:
        """Take the updates of one sweep in."""
        session, count = self._session, self._session.count
        every = torch.tensor(numbers, dtype=torch.float64)
        moved, floor, off = every[:count], every[count : 2 * count], every[2 * count :]
        final, update = leading(moved <= floor), float(moved.amax())
        self._gains = observed_gains(moved, self._updates, self._gains, floor, (1,))
        if off.numel() and not self.prefixes:
            known = torch.isfinite(off) & (off > 4 * floor[1:])
            self._gains[1:] = torch.where(known, moved[1:] / off.clamp_min(1e-300), torch.full_like(off, math.inf))
        self._updates = moved
        if update <= 1.0:
            update = max(update, errors_to_come(moved, self._gains, floor, (1,))[1])
        prefix = session.total if final == count else session.starts[final]
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
