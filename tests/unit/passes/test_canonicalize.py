from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import fx

from fxjacobi.ops import restride, write
from fxjacobi.passes.canonicalize import Canonicalize
from fxjacobi.passes.eliminate import Eliminate
from fxjacobi.passes.write_history import WriteHistory, normalised
from tests.unit.passes.programs import Program, assert_runs_as, build, programs, record, targets

aten = torch.ops.aten
R = torch.randn


def canonical(module: fx.GraphModule, *, gradients: bool = False, exact: bool = True) -> fx.GraphModule:
    return Eliminate().run(Canonicalize(gradients=gradients, exact=exact).run(module).module).module


def form(fn: Any, *args: torch.Tensor) -> list[tuple[Any, ...]]:
    """What ``fn``'s operations become: targets and literal arguments, with the bits checked."""
    module = build(fn, *args)
    rewritten = canonical(module)
    assert_runs_as(rewritten, module, *args)
    return [
        (node.target, *(arg for arg in node.args if not isinstance(arg, fx.Node)))
        for node in rewritten.graph.nodes
        if node.op == "call_function"
    ]


@settings(max_examples=100, deadline=None)
@given(programs())
def test_programs_keep_their_bits(program: Program) -> None:
    module = record(program, *program.arguments())
    result = canonical(module)
    note(str(result.graph))
    assert_runs_as(result, program, *program.arguments(1))
    # Before dead code goes, for what it reads counts as read: a loop's last iteration must look like the others.
    once = Canonicalize().run(module).module
    assert not Canonicalize().run(once).modified


def test_parts_become_selects_and_slices() -> None:
    select, part = aten.select.int, aten.slice.Tensor
    x = R(4, 6)
    assert form(lambda x: aten.neg.default(aten.unbind.int(x, -1)[2]), x)[0] == (select, 1, 2)
    assert form(lambda x: aten.neg.default(aten.split.Tensor(x, 4, 1)[1]), x)[0] == (part, 1, 4, 6)
    assert form(lambda x: aten.neg.default(aten.split.Tensor(x, 3)[1]), x)[0] == (select, 0, 3)
    assert form(lambda x: aten.neg.default(aten.split_with_sizes.default(x, [1, 2, 3], 1)[2]), x)[0] == (part, 1, 3, 6)
    for rewritten in (form(lambda x: aten.neg.default(aten.unbind.int(x)[0]), x),):
        assert all(target is not operator.getitem and target is not aten.unbind.int for target, *_ in rewritten)


@pytest.mark.parametrize(
    ("views", "wanted"),
    [
        (lambda x: aten.select.int(x, -1, -2), [(aten.select.int, 1, 4)]),
        (lambda x: aten.slice.Tensor(x, 0, 0, 9223372036854775807), []),
        (lambda x: aten.slice.Tensor(x, 1, 2, 3), [(aten.select.int, 1, 2), (aten.unsqueeze.default, 1)]),
        (lambda x: aten.slice.Tensor(x, 1, -1), [(aten.select.int, 1, 5), (aten.unsqueeze.default, 1)]),
        (lambda x: aten.slice.Tensor(x, 1, 5, 6, 3), [(aten.select.int, 1, 5), (aten.unsqueeze.default, 1)]),
        (lambda x: aten.select.int(aten.slice.Tensor(x, 1, 1, 6, 2), 1, 2), [(aten.select.int, 1, 5)]),
        (lambda x: aten.slice.Tensor(aten.slice.Tensor(x, 1, 1, 6), 1, 1, 3), [(aten.slice.Tensor, 1, 2, 4)]),
        (lambda x: aten.slice.Tensor(aten.slice.Tensor(x, 1, 0, 6, 2), 1, 1, 3), [(aten.slice.Tensor, 1, 2, 5, 2)]),
        (
            lambda x: aten.select.int(aten.slice.Tensor(x, 1, 1, 4), 0, 3),
            [(aten.select.int, 0, 3), (aten.slice.Tensor, 0, 1, 4)],
        ),
        (lambda x: aten.select.int(aten.unsqueeze.default(x, 1), 1, 0), []),
        (lambda x: aten.slice.Tensor(x, 0, 3, 1), [(aten.slice.Tensor, 0, 3, 3)]),
    ],
)
def test_views(views: Any, wanted: list[Any]) -> None:
    assert form(lambda x: aten.neg.default(views(x)), R(4, 6))[:-1] == wanted


def test_copies_and_detach() -> None:
    x = R(4, 6)
    assert len(form(lambda x: aten.neg.default(aten.clone.default(x)), x)) == 1
    assert len(form(lambda x: aten.neg.default(aten._to_copy.default(x, dtype=torch.float32)), x)) == 1
    assert len(form(lambda x: aten.neg.default(aten._to_copy.default(x, dtype=torch.float64)), x)) == 2
    assert len(form(lambda x: aten.neg.default(aten.detach.default(x)), x)) == 1
    transposed = form(
        lambda x: aten.neg.default(aten.clone.default(aten.t.default(x), memory_format=torch.contiguous_format)), x
    )
    assert len(transposed) == 3  # the copy changes the layout
    module = build(lambda x: aten.neg.default(aten.detach.default(x)), x)
    assert aten.detach.default in targets(canonical(module, gradients=True))


def test_a_copy_that_the_caller_gets_is_a_copy() -> None:
    for fn in (
        lambda x: aten.t.default(aten.clone.default(x)),
        lambda x: aten.view.default(aten.clone.default(x), [24]),
    ):
        x = R(4, 6)
        result = canonical(build(fn, x))
        (found,) = result(x)
        assert found.data_ptr() != x.data_ptr()


def test_reads_of_written_positions_are_the_values_written() -> None:
    def recurrence(x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(6)
        out[0], out[1] = x[0], x[1]
        for t in range(2, 6):
            out[t] = out[t - 1] * 2 + out[t - 2] * x[t]
        return out

    result = canonical(record(recurrence, R(6)))
    assert_runs_as(result, recurrence, R(6))
    for node in result.graph.nodes:
        if node.target is aten.select.int:
            assert node.args[0].op == "placeholder"


def test_reads_of_other_positions_see_the_array_before() -> None:
    def shifted(x: torch.Tensor) -> torch.Tensor:
        y = x * 1
        for t in range(5):
            y[t] = torch.tanh(y[t + 1])
        return y

    result = canonical(record(shifted, R(6, 3)))
    assert_runs_as(result, shifted, R(6, 3))
    bases = {node.args[0].target for node in result.graph.nodes if node.target is aten.select.int}
    assert bases == {aten.mul.Tensor}


def test_a_read_within_a_write_is_a_part_of_its_value() -> None:
    def parts(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(4, 6)
        y[:, 2] = x
        y[1, 4] = 7.0
        return y[3, 2] + y[1, 2] * y[1, 4]

    result = canonical(record(parts, R(4)))
    assert_runs_as(result, parts, R(4))
    assert write not in targets(result)
    assert targets(result).count(aten.select.int) == 2


def test_reads_that_may_see_several_writes_stay() -> None:
    def partly(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(4, 6)
        for t in range(6):
            y[:, t] = x + y[:, : t + 1].sum()
        return y[2]

    result = canonical(record(partly, R(4)))
    assert_runs_as(result, partly, R(4))
    assert write in targets(result)


def test_chunks_written_in_place_are_read_as_the_values_written() -> None:
    def gates(x: torch.Tensor) -> torch.Tensor:
        a, b, c = x.sin().chunk(3)
        a.sigmoid_()
        b.tanh_()
        c.mul_(a)
        return a * b + c

    result = canonical(record(gates, R(9)))
    assert_runs_as(result, gates, R(9))
    assert write not in targets(result)


def test_an_array_written_to_twice_from_one_version_is_two_arrays() -> None:
    def fork(b: Any, v: Any) -> Any:
        one = write(b, v, (0,))
        two = write(b, aten.neg.default(v), (1,))
        return aten.add.Tensor(aten.select.int(one, 0, 1), aten.select.int(two, 0, 1))

    form(fork, R(4, 3), R(3))


def test_a_full_write_is_its_value_and_a_scatter_is_a_write() -> None:
    base, value = R(4, 3), R(4, 3)

    def full(index: Any) -> Any:
        return lambda b, v: aten.neg.default(write(b, v, index))

    for index in ((), (None,), ((0, 4, 1), None)):
        assert form(full(index), base, value) == [(aten.neg.default,)]
    assert form(lambda b, v: aten.select_scatter.default(b, v, 1, -1), base, R(4)) == [(write, (None, 2))]
    assert form(lambda b, v: aten.slice_scatter.default(b, v, 0, 1, 3), base, R(2, 3)) == [(write, ((1, 3, 1),))]


def test_a_read_keeps_its_layout_where_rounding_may_depend_on_it() -> None:
    def read(x: Any, y: Any) -> Any:
        return aten.select.int(write(y, x, (None, 2)), 1, 2)

    def by_matrix(x: Any, y: Any, w: Any) -> Any:
        return aten.mm.default(read(x, y), w)

    def by_function(x: Any, y: Any) -> Any:
        return aten.sigmoid.default(aten.unsqueeze.default(read(x, y), 0))

    def by_element(x: Any, y: Any) -> Any:
        return aten.mul.Tensor(aten.unsqueeze.default(read(x, y), 0), 2)

    view = [aten.unsqueeze.default]
    for width, wanted in ((3, [write, aten.select.int, aten.mm.default]), (16, [restride, aten.mm.default])):
        args = R(4, width), R(4, 6, width), R(width, 5)
        module = build(by_matrix, *args)
        assert targets(canonical(module)) == wanted
        assert_runs_as(canonical(module), module, *args)
        assert targets(canonical(module, exact=False)) == [aten.mm.default]
    assert targets(canonical(build(by_function, R(4, 3), R(4, 6, 3)))) == [restride, *view, aten.sigmoid.default]
    assert targets(canonical(build(by_element, R(4, 3), R(4, 6, 3)))) == [*view, aten.mul.Tensor]


def test_a_sum_lies_as_its_first_term_does_so_that_what_follows_it_rounds_by_that() -> None:
    def after(x: Any, y: Any) -> Any:
        return aten.sigmoid.default(aten.add.Tensor(aten.select.int(write(y, x, (None, 2)), 1, 2), 1))

    turned, straight, array = R(3, 4).t(), R(4, 3), R(4, 6, 3)
    assert targets(canonical(build(after, turned, array))) == [restride, aten.add.Tensor, aten.sigmoid.default]
    assert targets(canonical(build(after, straight, array))) == [aten.add.Tensor, aten.sigmoid.default]


def test_an_array_that_starts_off_an_aligned_address_is_read_where_it_lies() -> None:
    def row(x: Any, y: Any, w: Any) -> Any:
        return aten.mm.default(aten.select.int(write(y, x, (2,)), 0, 2), w)

    def whole(x: Any, y: Any, w: Any) -> Any:
        return aten.mm.default(write(y, x, ()), w)

    def copied(x: Any, y: Any, w: Any) -> Any:
        return aten.mm.default(aten.clone.default(write(y, x, (2,))), w)

    def earlier(x: Any, y: Any, w: Any) -> Any:
        return aten.mm.default(aten.select.int(write(y, x, (2,)), 0, 3), w)

    odd = R(6, 1, 9)
    module = build(earlier, R(1, 9), odd, R(9, 5))
    assert targets(canonical(module)) == [aten.select.int, aten.mm.default], (
        "a row at an odd address, and no copy of it"
    )
    late, aligned = R(6 * 4 * 16 + 1)[1:].view(6, 4, 16), R(6, 4, 16)
    for fn, value, base, wanted in (
        (row, R(4, 16), late, [write, aten.select.int, aten.mm.default]),
        (row, R(4, 16), aligned, [aten.mm.default]),
        (whole, R(4, 16), late[0], [write, aten.mm.default]),
        (whole, R(4, 16), aligned[0], [aten.mm.default]),
        (copied, R(16), late[0], [write, aten.clone.default, aten.mm.default]),
        (copied, R(16), aligned[0], [write, aten.mm.default]),
    ):
        module = build(fn, value, base, R(16, 5))
        assert targets(canonical(module)) == wanted
        assert_runs_as(canonical(module), module, value, base, R(16, 5))


def test_a_copy_is_kept_where_it_aligns_a_row_for_a_product() -> None:
    def product(x: Any, w: Any) -> Any:
        return aten.mv.default(w, aten.clone.default(aten.select.int(x, 0, 1)))

    module = build(product, R(4, 3), R(5, 3))
    assert aten.clone.default in targets(canonical(module))
    assert aten.clone.default not in targets(canonical(module, exact=False))


def test_a_value_the_caller_gets_is_not_another_of_its_results() -> None:
    def both(x: Any, y: Any) -> Any:
        h = aten.tanh.default(x)
        return aten.select.int(write(y, h, (1,)), 0, 1), h

    a, b = canonical(build(both, R(4), R(3, 4)))(R(4), R(3, 4))
    assert a.data_ptr() != b.data_ptr()


entries = st.one_of(
    st.none(), st.integers(0, 3), st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 2)).map(tuple)
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(entries, entries), min_size=1, max_size=6),
    st.lists(st.tuples(entries, entries, st.integers(0, 6)), min_size=1, max_size=4),
)
def test_any_reads_of_any_writes(writes: list[Any], reads: list[Any]) -> None:
    def program(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 1
        results = []
        for number, index in enumerate(writes):
            at = tuple(slice(None) if i is None else slice(*i) if isinstance(i, tuple) else i for i in index)
            y[at] = x[at] * (number + 2)
            for *read, when in reads:
                if when == number:
                    chosen = tuple(slice(None) if i is None else slice(*i) if isinstance(i, tuple) else i for i in read)
                    results.append(y[chosen] + 1)
        return (y, *results)

    module = record(program, R(4, 4))
    result = canonical(module)
    note(str(result.graph))
    assert_runs_as(result, program, R(4, 4))


def test_a_chain_of_writes_takes_one_look_a_read() -> None:
    """The lists that a read looks through hold the writes at its own position, not all before it."""
    history = WriteHistory()
    graph = fx.Graph()
    array = value = graph.placeholder("x")
    looks = 0
    for t in range(50):
        region = normalised((None, t), (3, 50))
        assert region is not None
        made = graph.call_function(write, (array, value, (None, t)))
        history.write(made, array, value, region, short=False)
        array = made
        chain, version = history._chains[array]
        looks += len(list(chain.seen_by((None, t), version)))
        assert history.find(array, (None, t)) == (value, region)
        if t < 49:
            assert history.find(array, (None, t + 1)) == (graph.find_nodes(op="placeholder")[0], None)
    assert looks == 50
