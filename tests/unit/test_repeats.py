from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from fxjacobi.graph import TensorSpec, make_module, stamp
from fxjacobi.loops import Carried, Invariant, Literal, Scanned, Table
from fxjacobi.repeats import Fixed, Repeat, Same, classify, find_repeats
from fxjacobi.tape import Tape, literal_key, rebuild, tabulate

aten = torch.ops.aten


def spec(*shape: int, dtype: torch.dtype = torch.float32) -> TensorSpec:
    return TensorSpec(shape, dtype, torch.device("cpu"), (1,) * len(shape))


class Builder:
    """A graph written node by node."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def leaf(self, name: str, *shape: int) -> fx.Node:
        return stamp(self.graph.placeholder(name), spec(*shape))

    def call(self, target: Any, *args: Any, shape: tuple[int, ...] = (3,), **kwargs: Any) -> fx.Node:
        return stamp(self.graph.call_function(target, args, kwargs), spec(*shape))

    def tape(self, *outputs: fx.Node) -> Tape:
        self.graph.output(outputs)
        return tabulate(make_module({}, self.graph))


def references(tape: Tape, repeat: Repeat) -> list[list[Any]]:
    """What the slots of each iteration hold, from the columns of :func:`classify` alone."""
    flow = classify(tape, repeat)
    rows = []
    for t in range(repeat.trips):
        row: list[Any] = []
        for column in flow.columns:
            match column:
                case Same(position):
                    row.append(repeat.start + t * repeat.period + position)
                case Fixed(value):
                    row.append(("literal", literal_key(value)))
                case Literal(values):
                    row.append(("literal", literal_key(values[t])))
                case Carried(position, distance, init):
                    before = t - distance
                    row.append(init[t] if before < 0 else repeat.start + before * repeat.period + position)
                case Invariant(reference):
                    row.append(reference)
                case Table(items):
                    row.append(items[t])
                case Scanned(base, dim, indices):
                    row.append(("slice", base, dim, indices[t]))
        rows.append(row)
    return rows


def assert_columns_say_what_the_tape_holds(tape: Tape, repeat: Repeat) -> None:
    for t, row in enumerate(references(tape, repeat)):
        begin = int(tape.first[repeat.start + t * repeat.period])
        for at, said in enumerate(row, begin):
            value = int(tape.values[at])
            if tape.literal[at]:
                assert said == ("literal", literal_key(tape.literals[value]))
            elif isinstance(said, tuple):
                found = (tape.select_base[value], tape.select_dim[value], tape.select_index[value])
                assert said == ("slice", *map(int, found))
            else:
                assert said == value
                assert said < tape.owner[at]
    flow = classify(tape, repeat)
    for column in flow.columns:
        for outside in (
            column.init if isinstance(column, Carried)
            else column.operands if isinstance(column, Table)
            else [column.operand] if isinstance(column, (Invariant, Scanned))
            else []
        ):  # fmt: skip
            assert outside < repeat.start


def test_a_recurrence_from_any_rotation() -> None:
    for before in range(4):
        b = Builder()
        x, h, w = b.leaf("x", 20, 3), b.leaf("h", 3), b.leaf("w", 3, 3)
        for _ in range(before):  # nodes that look like the end of an iteration
            h = b.call(aten.tanh.default, h)
        for t in range(20):
            item = b.call(aten.select.int, x, 0, t)
            h = b.call(aten.tanh.default, b.call(aten.add.Tensor, b.call(aten.mv.default, w, h), item))
        tape = b.tape(h)
        (repeat,) = find_repeats(tape)
        assert repeat == Repeat(before, 4, 20)
        assert_columns_say_what_the_tape_holds(tape, repeat)
        kinds = [type(column) for column in classify(tape, repeat).columns]
        assert kinds == [Invariant, Fixed, Literal, Invariant, Carried, Same, Scanned, Same]


def test_the_smallest_of_equal_periods_and_the_outermost_loop() -> None:
    b = Builder()
    h = b.leaf("h", 3)
    for _ in range(24):
        h = b.call(aten.tanh.default, h)
    assert find_repeats(b.tape(h)) == (Repeat(0, 1, 24),)
    b = Builder()
    h = b.leaf("h", 3)
    for _ in range(4):
        for _ in range(30):
            h = b.call(aten.tanh.default, h)
        h = b.call(aten.exp.default, h)
    assert find_repeats(b.tape(h)) == (Repeat(0, 31, 4),)


def test_two_layers_of_one_shape_have_the_period_of_both() -> None:
    b = Builder()
    h = [b.leaf("h", 3), b.leaf("k", 3)]
    xs = [b.leaf(f"x{t}", 3) for t in range(12)]
    y = xs[0]
    for t in range(12):
        y = xs[t]
        for layer in range(2):
            y = h[layer] = b.call(aten.tanh.default, b.call(aten.add.Tensor, y, h[layer]))
    tape = b.tape(y)
    (repeat,) = find_repeats(tape)
    assert (repeat.period, repeat.trips) == (4, 12)
    assert_columns_say_what_the_tape_holds(tape, repeat)


def test_an_outer_period_that_only_the_dataflow_shows() -> None:
    """All labels repeat with the inner period; the outer loop is where the inner dataflow breaks."""
    b = Builder()
    start, w = b.leaf("h", 3), [b.leaf(f"w{i}", 3) for i in range(7)]
    ends = []
    for i in range(7):
        h = start
        for _ in range(40):
            h = b.call(aten.tanh.default, b.call(aten.mul.Tensor, h, w[i]))
        ends.append(h)
    tape = b.tape(*ends)
    (repeat,) = find_repeats(tape)
    assert (repeat.period, repeat.trips) == (80, 7)
    assert_columns_say_what_the_tape_holds(tape, repeat)


def test_a_break_in_the_dataflow_ends_a_loop() -> None:
    """The planted violation: one iteration reads a state that is not the one before."""
    for wrong in (5, 11):
        b = Builder()
        h = [b.leaf("h", 3)]
        for t in range(20):
            source = h[-3] if t == wrong else h[-1]
            h.append(b.call(aten.tanh.default, b.call(aten.mul.Tensor, source, 2.0)))
        tape = b.tape(h[-1])
        repeats = find_repeats(tape)
        for repeat in repeats:
            assert_columns_say_what_the_tape_holds(tape, repeat)
            assert not repeat.start < 2 * wrong < repeat.stop - repeat.period
        assert sum(repeat.trips for repeat in repeats) >= 18


def test_random_nodes_match_nothing_and_specs_count() -> None:
    b = Builder()
    h = b.leaf("h", 3)
    for _ in range(10):
        h = b.call(aten.add.Tensor, h, b.call(aten.rand.default, [3]))
    tape = b.tape(h)
    assert len(set(tape.labels[1::2].tolist())) == 1
    assert len(set(tape.labels[::2].tolist())) == 10 + 1  # ten draws and the output
    assert find_repeats(tape) == ()
    b = Builder()
    h = b.leaf("h", 1)
    for t in range(10):
        h = b.call(aten.constant_pad_nd.default, h, [0, 1], shape=(t + 2,))
    assert find_repeats(b.tape(h)) == ()


def test_strides_and_literal_values_do_not_count_but_their_types_do() -> None:
    b = Builder()
    x = b.leaf("x", 3)
    nodes = [b.call(aten.mul.Tensor, x, literal) for literal in (1, 2, 1.0, True, None)]
    nodes[1].meta["spec"] = TensorSpec((3,), torch.float32, torch.device("cpu"), (7,))
    nodes += [b.call(aten.clamp.default, x, min=1), b.call(aten.clamp.default, x, max=1)]
    labels = b.tape(x).labels.tolist()
    assert labels[0] == labels[1]
    assert len(set(labels[:-1])) == 6


def test_rebuild_walks_the_leaves_in_the_order_of_the_slots() -> None:
    value = ([1, (2, None)], {"a": 3}, slice(4, 5, None))
    seen: list[Any] = []

    def leaf(item: Any) -> Any:
        seen.append(item)
        return len(seen)

    assert rebuild(value, leaf) == ([1, (2, 3)], {"a": 4}, slice(5, 6, 7))
    assert seen == [1, 2, None, 3, 4, 5, None]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(3, 9),
    st.lists(st.tuples(st.sampled_from([0, 1, 2]), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=60),
    st.integers(0, 2**31),
)
def test_whatever_is_found_is_a_loop(period: int, trips: int, noise: list[tuple[int, int, int]], seed: int) -> None:
    """Regular programs with random changes of operations and references."""
    rng = np.random.default_rng(seed)
    operations = [aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor]
    kinds = rng.integers(0, 3, period).tolist()
    reach = rng.integers(1, 2 * period + 1, (period, 2)).tolist()
    changes = {at: (kind, shift) for kind, at, shift in noise[: len(noise) // 8]}
    b = Builder()
    values = [b.leaf(f"x{i}", 3) for i in range(2 * period)]
    for i in range(period * trips):
        kind, shift = kinds[i % period], 0
        if i in changes:
            kind, shift = changes[i]
        back = [max(-len(values), -(r + shift)) for r in reach[i % period]]
        values.append(b.call(operations[kind], values[back[0]], values[back[1]]))
    tape = b.tape(values[-1])
    repeats = find_repeats(tape, minimum_nodes=3)
    for a, c in itertools.pairwise(repeats):
        assert a.stop <= c.start
    for repeat in repeats:
        assert repeat.trips >= 3
        assert_columns_say_what_the_tape_holds(tape, repeat)
    if not changes:
        covered = sum(repeat.stop - repeat.start for repeat in repeats)
        assert covered >= period * (trips - 3)
