"""Which stretches of a straight graph are the unrolled iterations of a loop, and how data flows in them.

A stretch ``[start, start + T p)`` of a :class:`~fxjacobi.tape.Tape` is a *tandem repeat* of period ``p`` if
``labels[i] == labels[i + p]`` all along it. It is a *loop* if moreover every slot (argument position of the period)
has one explanation for all ``T`` iterations: the same iteration, the iteration ``d`` before (its first ``d`` values
come from before the loop), or values that are all there before the loop. A slot of node ``i`` that holds ``g`` and
should hold ``i - D`` allows only loops that start after both, so each node puts a lower bound on ``start``:

    need_i = max over its slots of (max(g, i - D) + 1 if g != i - D else none),   valid iff need_i <= start for all i

which finds the longest loops of a period in one pass, and at every rotation at once.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from fxjacobi.loops import Carried, Invariant, Literal, Scanned, Table
from fxjacobi.rotation import rotation

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fxjacobi.tape import Integers, Tape

__all__ = ["Column", "Dataflow", "Fixed", "Repeat", "Same", "Sliced", "classify", "find_repeats", "indices_of"]

_HISTOGRAM = 512
"""How many of the most frequent gaps between equal labels are looked at as periods."""
_SAMPLES = 1024
"""How many positions estimate how much of the tape a period covers."""
_EXACT = 24
"""How many of the best estimates are compared in full."""
_REPETITIONS = 8
"""A label may occur this often in a period and still have the period among its gaps."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """``trips`` iterations of ``period`` nodes each, from position ``start`` of the tape on."""

    start: int
    period: int
    trips: int

    @property
    def stop(self) -> int:
        """The position after the last node."""
        return self.start + self.period * self.trips


@dataclass(frozen=True, slots=True)
class Same:
    """The value of the node at ``position`` of the period, in the same iteration."""

    position: int


@dataclass(frozen=True, slots=True)
class Fixed:
    """A literal that no iteration changes."""

    value: object


Column: TypeAlias = Same | Fixed | Carried | Scanned | Table | Invariant | Literal
"""What one slot of the period holds. In the bindings of :mod:`fxjacobi.loops` used here, operands and initial
values are tape references, and ``Carried.output`` is a position of the period."""


@dataclass(frozen=True, slots=True)
class Sliced:
    """A ``select`` inside the period whose tensor is there before the loop: ``base.select(dim, indices[t])``."""

    base: int
    dim: int
    indices: Sequence[int]


@dataclass(frozen=True, slots=True)
class Dataflow:
    """The dataflow of a repeat: one column a slot of the period, in order, and the period's sliced positions."""

    columns: tuple[Column, ...]
    sliced: dict[int, Sliced]


def find_repeats(tape: Tape, *, minimum_trips: int = 3, minimum_nodes: int = 8) -> tuple[Repeat, ...]:
    """Return the loops of ``tape``, apart from one another and in order.

    The loop that covers the most nodes is taken first (of equals, the one of the smallest period), then the next on
    what is left, and so on. A period that only moves data (views, constants, guards) is never a loop.
    """
    found: list[Repeat] = []
    stretches = [(0, len(tape.nodes) - 1)]
    while stretches:
        low, high = stretches.pop()
        if high - low < max(minimum_nodes, minimum_trips):
            continue
        repeats = sorted(_Search(tape, low, high, minimum_trips, minimum_nodes).run(), key=lambda repeat: repeat.start)
        if repeats:
            found += repeats
            edges = [low, *(edge for repeat in repeats for edge in (repeat.start, repeat.stop)), high]
            stretches += zip(edges[::2], edges[1::2], strict=True)
    return tuple(sorted(found, key=lambda repeat: repeat.start))


class _Search:
    """One round of greedy choice on the nodes ``[low, high)``."""

    def __init__(self, tape: Tape, low: int, high: int, minimum_trips: int, minimum_nodes: int) -> None:
        self.tape = tape
        self.low = low
        self.high = high
        self.minimum_trips = minimum_trips
        self.minimum_nodes = minimum_nodes
        self.computing = np.concatenate(([0], np.cumsum(tape.computes[low:high])))
        self.heap: list[tuple[int, int, bool, int, int]] = []
        self.tried: set[int] = set()
        self.taken: list[tuple[int, int]] = []

    def run(self) -> Iterator[Repeat]:
        tape = self.tape
        for period in _periods(tape.labels[self.low : self.high], self.minimum_trips):
            self.push_runs(period)
        while self.heap:
            _, period, verified, start, stop = heapq.heappop(self.heap)
            free_start, free_stop = self.largest_free(start, stop)
            if (free_start, free_stop) != (start, stop):
                self.push(period, verified, free_start, free_stop)
            elif verified:
                repeat = Repeat(*rotation(tape, start, stop, period, self.minimum_trips))
                bisect.insort(self.taken, (repeat.start, repeat.stop))
                yield repeat
            else:
                intervals, cuts = _consistent(tape, start, stop, period)
                for interval_start, interval_stop in intervals:
                    self.push(period, True, interval_start, interval_stop)
                for multiple in _gaps(cuts, (cuts - start) % period)[:4]:
                    self.push_runs(int(multiple))

    def push(self, period: int, verified: bool, start: int, stop: int) -> None:
        coverage = (stop - start) // period * period
        if coverage < max(self.minimum_nodes, self.minimum_trips * period):
            return
        if not self.computing[start - self.low + period] - self.computing[start - self.low]:
            return
        heapq.heappush(self.heap, (-coverage, period, verified, start, stop))

    def push_runs(self, period: int) -> None:
        """Push the maximal stretches on which the labels repeat with ``period``."""
        if period in self.tried or period * self.minimum_trips > self.high - self.low:
            return
        self.tried.add(period)
        labels = self.tape.labels[self.low : self.high]
        equal = np.concatenate(([False], labels[:-period] == labels[period:], [False]))
        edges = np.flatnonzero(equal[1:] != equal[:-1])
        starts, stops = edges[::2], edges[1::2] + period
        long = stops - starts >= self.minimum_trips * period
        for start, stop in zip(starts[long].tolist(), stops[long].tolist(), strict=True):
            self.push(period, False, self.low + start, self.low + stop)

    def largest_free(self, start: int, stop: int) -> tuple[int, int]:
        """The longest part of ``[start, stop)`` that no loop has taken."""
        at = max(bisect.bisect_right(self.taken, (start, start)) - 1, 0)
        best = (start, start)
        here = start
        while here < stop:
            taken_start, taken_stop = self.taken[at] if at < len(self.taken) else (stop, stop)
            best = max(best, (here, min(taken_start, stop)), key=lambda part: part[1] - part[0])
            here = max(here, taken_stop)
            at += 1
        return best


def _gaps(positions: Integers, labels: Integers) -> Integers:
    """Distances between occurrences of one label that are 1 to 8 occurrences apart, the most telling first."""
    if not len(positions):
        return positions
    order = np.argsort(labels, kind="stable")
    positions, labels = positions[order], labels[order]
    extent = int(positions.max() - positions.min()) + 1
    counts = np.zeros(extent + 1, dtype=np.int64)
    for apart in range(1, min(_REPETITIONS, len(labels) - 1) + 1):
        same = labels[apart:] == labels[:-apart]
        gaps = (positions[apart:] - positions[:-apart])[same]
        counts += np.bincount(gaps, minlength=extent + 1)
    counts[0] = 0
    gaps = np.flatnonzero(counts)
    scores = np.minimum(extent, (counts[gaps] + 1) * gaps)
    return gaps[np.lexsort((gaps, -scores))]


def _periods(labels: Integers, minimum_trips: int) -> list[int]:
    """The periods by which much of ``labels`` may repeat, the most promising first."""
    gaps = _gaps(np.arange(len(labels)), labels)
    gaps = gaps[gaps * minimum_trips <= len(labels)][:_HISTOGRAM]
    if len(gaps) > _EXACT:
        sample = np.random.default_rng(0).integers(0, len(labels), _SAMPLES)
        ahead = sample[:, None] + gaps[None, :]
        equal = (labels[np.minimum(ahead, len(labels) - 1)] == labels[sample][:, None]) & (ahead < len(labels))
        covered = equal.sum(axis=0) * len(labels) // _SAMPLES + gaps
        gaps = gaps[np.lexsort((gaps, -covered))][:_EXACT]
    return [int(gap) for gap in gaps]


def _consistent(tape: Tape, start: int, stop: int, period: int) -> tuple[list[tuple[int, int]], Integers]:
    """Return the maximal parts of a label run on which the dataflow is a loop's, and the nodes between them."""
    begin, end = int(tape.first[start]), int(tape.first[stop])
    slots = int(tape.first[start + period]) - begin
    trips = (stop - start) // period
    if not slots:
        return [(start, stop)], np.empty(0, dtype=np.int64)
    values, owner, literal = tape.values[begin:end], tape.owner[begin:end], tape.literal[begin : begin + slots]
    delta = owner - values
    matrix = delta[: trips * slots].reshape(trips, slots)
    expected = matrix[-1].copy()
    changing = np.flatnonzero((matrix[1:] != matrix[:-1]).any(axis=0) & ~literal)
    # The distance of most references into the stretch is the slot's; a slot without one takes all its values from
    # before the loop. (What lies before the stretch may be initial values, at any distance.)
    moving = matrix[:, changing]
    inner = moving <= (owner[: trips * slots].reshape(trips, slots)[:, changing] - start)
    count = inner.sum(axis=0)
    ordered = np.sort(np.where(inner, moving, np.iinfo(np.int64).max), axis=0)
    middle = np.take_along_axis(ordered, (count // 2)[None, :], axis=0)[0]
    most = ((moving == middle) & inner).sum(axis=0) * 2 > count
    expected[changing] = np.where(most, middle, 0)
    wanted = np.resize(expected, end - begin)
    wrong = (delta != wanted) & ~np.resize(literal, end - begin)
    wrong_values, wrong_owner, wrong_wanted = values[wrong], owner[wrong], wanted[wrong]
    need = np.where(wrong_wanted > 0, np.maximum(wrong_values, wrong_owner - wrong_wanted), wrong_values) + 1
    late = need > start
    intervals: list[tuple[int, int]] = []
    cuts: list[int] = []
    here = start
    for node, bound in zip(wrong_owner[late].tolist(), need[late].tolist(), strict=True):
        if bound > here:
            if node > here:
                intervals.append((here, node))
            here = bound
            cuts.append(node)
    intervals.append((here, stop))
    return intervals, np.asarray(cuts, dtype=np.int64)


def indices_of(values: Integers) -> Sequence[int]:
    """``values`` as a range if they are affine, else as a tuple."""
    items: list[int] = values.tolist()
    step = items[1] - items[0] if len(items) > 1 else 1
    if step and all(b - a == step for a, b in itertools.pairwise(items)):
        return range(items[0], items[-1] + (1 if step > 0 else -1), step)
    return tuple(items)


def _sliced(tape: Tape, references: Integers, start: int) -> Sliced | None:
    """What ``references`` are if all are slices of one tensor from before ``start``, and not one and the same."""
    if (references < 0).any():
        return None
    base, dim, index = tape.select_base[references], tape.select_dim[references], tape.select_index[references]
    if base[0] >= start or (base != base[0]).any() or (dim != dim[0]).any() or (index == index[0]).all():
        return None
    return Sliced(int(base[0]), int(dim[0]), indices_of(index))


def classify(tape: Tape, repeat: Repeat) -> Dataflow:
    """Say what each slot of ``repeat`` holds; ``repeat`` is one that :func:`find_repeats` returned."""
    start, period, trips = repeat.start, repeat.period, repeat.trips
    begin = int(tape.first[start])
    slots = int(tape.first[start + period]) - begin
    values = tape.values[begin : begin + trips * slots].reshape(trips, slots)
    owner = tape.owner[begin : begin + trips * slots].reshape(trips, slots)
    literal = tape.literal[begin : begin + slots]
    nodes = np.arange(start, repeat.stop).reshape(trips, period)
    sliced: dict[int, Sliced] = {}
    base = tape.select_base[nodes]
    for position in np.flatnonzero((base.min(axis=0) == base.max(axis=0)) & (base.max(axis=0) < start)).tolist():
        found = _sliced(tape, nodes[:, position], start)
        if found is not None:
            sliced[position] = found
    constant = values.min(axis=0) == values.max(axis=0)
    inside = (values.max(axis=0) >= start) & ~literal
    same = inside & (values[-1] >= repeat.stop - period)
    columns: list[Column] = []
    for slot in range(slots):
        if same[slot]:
            position = int(values[-1, slot] - start) % period
            part = sliced.get(position)
            columns.append(Scanned(part.base, part.dim, part.indices) if part is not None else Same(position))
        elif literal[slot]:
            items = [tape.literals[index] for index in ([values[0, slot]] if constant[slot] else values[:, slot])]
            columns.append(Fixed(items[0]) if constant[slot] else Literal(tuple(items)))
        elif constant[slot]:
            columns.append(Invariant(int(values[0, slot])))
        else:
            columns.append(_moving(tape, values[:, slot], owner[:, slot], start, period, inside=bool(inside[slot])))
    return Dataflow(tuple(columns), sliced)


def _moving(tape: Tape, values: Integers, owner: Integers, start: int, period: int, *, inside: bool) -> Column:
    """What a slot holds whose value is another in every iteration, none of them its own."""
    part = _sliced(tape, values, start)
    if part is not None:
        return Scanned(part.base, part.dim, part.indices)
    if not inside:
        return Table(tuple(values.tolist()))
    target = int(owner[-1] - start) % period - int(owner[-1] - values[-1])
    return Carried(target % period, -(target // period), tuple(values[: -(target // period)].tolist()))
