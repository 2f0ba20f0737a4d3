"""The Jacobi solver of sampling loops, on loops built by hand: bits, sweeps, windows, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxjacobi import ops
from fxjacobi.causal_rules.interpreter import operand_value
from fxjacobi.causality import CausalityProof, prove
from fxjacobi.certificate import Certificate
from fxjacobi.errors import GuardFailed
from fxjacobi.graph import TensorSpec
from fxjacobi.loops import Loop, Result, Scanned, Stacked, Step, Table
from fxjacobi.sampling import JacobiWrites
from tests.unit.sampling_loops import (
    Sampling,
    call,
    made_loop,
    recorded,
    same,
    sampling_loop,
    solve,
    write,
)
from tests.unit.sampling_models import made, pixel_cnn

aten = torch.ops.aten


@pytest.mark.parametrize("window", [None, 1, 5, 11, 12])
def test_equals_the_loop_bit_for_bit(window: int | None) -> None:
    sampling = made_loop()
    block, found = solve(sampling, window=window)
    assert same(found, sampling.ordinary())
    assert block.last is not None
    assert block.last.prefixes[-1] == 12
    assert list(block.last.prefixes) == sorted(set(block.last.prefixes))  # every sweep makes progress


def test_results_of_single_steps_and_stacks() -> None:
    results: list[Result] = [Step(0, 11), Step(0, 4), Stacked(1), Step(2, 7), Stacked(0)]
    for window in (None, 5):
        sampling = made_loop(results=results)
        _, found = solve(sampling, window=window)
        assert same(found, sampling.ordinary())


def test_the_sweep_after_the_answer_changes_nothing() -> None:
    block, _ = solve(made_loop(size=96))
    assert block.last is not None
    assert block.last.sweeps < 40
    assert block.last.certificate is Certificate.REPEATED


def test_raster_order_through_nested_scatters() -> None:
    side, batch = 5, 2
    start = torch.zeros(batch, 1, side, side)
    net, tensors = recorded(pixel_cnn(), start)
    places = [(i, j) for i in range(side) for j in range(side)]

    def body(x: Any, i: Any, j: Any, n: Any, *weights: Any) -> Any:
        here = call(aten.select.int, call(aten.select.int, net(x, *weights), 2, i), 2, j)
        mean, scale = call(aten.select.int, here, 1, 0), call(aten.select.int, here, 1, 1)
        value = call(aten.add.Tensor, mean, call(aten.mul.Tensor, call(aten.exp.default, scale), n))
        row = call(aten.select.int, x, 2, i)
        row = call(aten.select_scatter.default, row, call(aten.unsqueeze.default, value, 1), 2, j)
        return call(aten.select_scatter.default, x, row, 2, i)

    literals = [[i for i, _ in places], [j for _, j in places]]
    sampling = sampling_loop(body, start, literals, torch.randn(len(places), batch), tensors)
    for window in (None, 7):
        block, found = solve(sampling, window=window)
        assert same(found, sampling.ordinary())
        assert block.last is not None
        assert block.last.sweeps < len(places)


def several_writes(*, ahead: bool = False) -> Sampling:
    """Two writes a step, the second after another run of the network that sees the first."""
    size, batch = 8, 3
    net, tensors = recorded(made(size, 32), torch.zeros(batch, size))

    def body(x: Any, a: Any, b: Any, n: Any, *weights: Any) -> Any:
        first = call(aten.mul.Tensor, call(aten.select.int, net(x, *weights), 1, b if ahead else a), n)
        x1 = write(x, first, (None, a))
        second = call(aten.add.Tensor, call(aten.select.int, net(x1, *weights), 1, b), n)
        return write(x1, second, (None, b)), second

    literals = [range(0, size, 2), range(1, size, 2)]
    results: list[Result] = [Step(0, 3), Step(0, 1), Stacked(1)]
    return sampling_loop(body, torch.zeros(batch, size), literals, torch.randn(4, batch), tensors, results=results)


def test_several_writes_a_step_share_one_evaluation() -> None:
    sampling = several_writes()
    for window in (None, 2):
        block, found = solve(sampling, window=window)
        assert same(found, sampling.ordinary())
        assert sum(node.target is aten.addmm.default for node in block.network.graph.nodes) == 3


@pytest.mark.parametrize("window", [None, 4])
def test_what_a_step_reads_of_its_own_write_is_of_the_final_array(window: int | None) -> None:
    # A step that is final with a value that its last sweep changed has read the array as it was before that sweep.
    net, tensors = recorded(made(24, 32), torch.zeros(3, 24))

    def body(x: Any, t: Any, n: Any, *weights: Any) -> Any:
        written = write(x, call(aten.add.Tensor, call(aten.select.int, net(x, *weights), 1, t), n), (None, t))
        return written, call(aten.mul.Tensor, call(aten.select.int, written, 1, t), 2.0)

    results: list[Result] = [Step(0, 23), Stacked(1)]
    sampling = sampling_loop(body, torch.zeros(3, 24), [range(24)], torch.randn(24, 3), tensors, results=results)
    block, found = solve(sampling, window=window)
    assert block.last is not None
    assert window is not None or block.last.certificate is Certificate.REPEATED
    assert same(found, sampling.ordinary())


def test_a_read_between_two_writes_may_not_see_the_second() -> None:
    # Element b of the network's output depends on element a, which the read before the first write does not see.
    refusal = prove(several_writes(ahead=True).loop, several_writes(ahead=True).known)
    assert not isinstance(refusal, CausalityProof)
    assert refusal.element is not None


def test_several_elements_a_step_and_reads_of_the_base() -> None:
    size, batch = 12, 2
    weight = torch.randn(size, size).tril(-3)
    weight = weight * torch.kron(torch.ones(4, 4).tril(-1), torch.ones(3, 3))

    def body(x: Any, low: Any, high: Any, n: Any, w: Any) -> Any:
        mixed = call(aten.mm.default, x, call(aten.t.default, w))
        value = call(aten.mul.Tensor, call(aten.slice.Tensor, mixed, 1, low, high), n)
        before = call(aten.slice.Tensor, x, 1, low, high)  # what was there before the loop
        return call(aten.slice_scatter.default, x, call(aten.add.Tensor, value, before), 1, low, high)

    literals = [range(0, size, 3), range(3, size + 1, 3)]
    sampling = sampling_loop(body, torch.randn(batch, size), literals, torch.randn(4, batch, 3), [weight])
    _, found = solve(sampling)
    assert same(found, sampling.ordinary())


def test_a_permuted_transposed_array() -> None:
    size, batch = 6, 4
    order = [4, 0, 5, 2, 1, 3]
    weight = torch.zeros(size, size)
    for place, row in enumerate(order):
        weight[row, order[:place]] = torch.randn(place)
    start = torch.zeros(size, batch).t()

    def body(x: Any, t: Any, n: Any, w: Any) -> Any:
        mixed = call(aten.tanh.default, call(aten.mm.default, x, call(aten.t.default, w)))
        return write(x, call(aten.add.Tensor, call(aten.select.int, mixed, 1, t), n), (None, t))

    sampling = sampling_loop(body, start, [order], torch.randn(size, batch), [weight])
    block, found = solve(sampling)
    assert block.proof.depth == size
    assert same(found, sampling.ordinary())
    assert found[0].stride() == sampling.ordinary()[0].stride()


def test_tables_python_values_and_guards() -> None:
    sampling = made_loop(size=6)
    loop, noise = sampling.loop, sampling.operands[1]

    # The same loop with a table of noise, and a branch on each value.
    graph = loop.body.graph
    value: Any = graph.output_node().args[0][1]  # type: ignore[index]
    with graph.inserting_before(graph.output_node()):
        positive = graph.call_function(aten.gt.Scalar, (value, -1e9))
        every = graph.call_function(aten.all.default, (positive,))
        check = graph.call_function(ops.guard, (every, True))
        for node in (positive, every, check):
            node.meta["spec"] = None if node is check else value.meta["spec"]
    loop.body.recompile()
    operands = [*sampling.operands, *noise]
    first = len(sampling.operands)
    bindings = [Table(tuple(range(first, first + 6))) if isinstance(b, Scanned) else b for b in loop.bindings]
    tabled = Loop(loop.body, 6, bindings, loop.results)
    known = [*sampling.known, *(operand_value(row, None) for row in noise)]
    proof = prove(tabled, known)
    assert isinstance(proof, CausalityProof), proof
    with torch.no_grad():
        assert same(JacobiWrites(proof)(*operands), tabled(*operands))
        wild = [*operands[:first], *(row - 1e30 for row in noise)]
        with pytest.raises(GuardFailed):
            tabled(*wild)
        with pytest.raises(GuardFailed):
            JacobiWrites(proof)(*wild)


def test_gradients_run_the_loop_in_order() -> None:
    sampling = made_loop()
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof)
    block = JacobiWrites(proof)
    start, noise, *tensors = sampling.operands
    noise = noise.clone().requires_grad_()
    (found,) = block(start, noise, *tensors)
    found.sum().backward()
    assert noise.grad is not None
    assert block.last is not None
    assert block.last.certificate is Certificate.SEQUENTIAL


@pytest.mark.parametrize("window", [None, 1, 4])
def test_a_python_value_at_each_step(window: int | None) -> None:
    net, tensors = recorded(made(6, 16), torch.zeros(2, 6))

    def body(x: Any, t: Any, temperature: Any, n: Any, *weights: Any) -> Any:
        value = call(aten.mul.Tensor, call(aten.select.int, net(x, *weights), 1, t), temperature)
        return write(x, call(aten.add.Tensor, value, n), (None, t))

    literals: list[Any] = [range(6), [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]]
    sampling = sampling_loop(body, torch.zeros(2, 6), literals, torch.randn(6, 2), tensors)
    _, found = solve(sampling, window=window)
    assert same(found, sampling.ordinary())


class Greedy(nn.Module):
    """A tail that has memory for a few steps only."""

    def __init__(self, tail: nn.Module, steps: int, most: int) -> None:
        super().__init__()
        self.tail, self.steps, self.most = tail, steps, most

    def forward(self, *operands: torch.Tensor) -> Any:
        if self.steps > self.most:
            raise torch.OutOfMemoryError("planted")
        return self.tail(*operands)


@pytest.mark.parametrize("most", [1, 3, 11])
def test_the_window_shrinks_where_a_tail_does_not_fit(most: int) -> None:
    sampling = made_loop()
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof)
    block = JacobiWrites(proof, batch=lambda tail: Greedy(tail, tail.trip_count, most))
    with torch.no_grad():
        assert same(block(*sampling.operands), sampling.ordinary())
    assert block.window == max(size for size in (1, 2, 3, 6) if size <= most)
    assert str(block.window) in block.method
    with torch.no_grad():
        assert same(block(*sampling.operands), sampling.ordinary())


def test_a_step_that_does_not_fit_is_out_of_memory() -> None:
    sampling = made_loop()
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof)
    block = JacobiWrites(proof, batch=lambda tail: Greedy(tail, tail.trip_count, 0))
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        block(*sampling.operands)


@pytest.mark.parametrize(("limit", "window"), [(1, 1), (10**4, None), (300, 5)])
def test_a_limit_of_memory_sets_the_window(limit: int, window: int | None) -> None:
    sampling = made_loop()
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof)
    block = JacobiWrites(proof, memory_limit=limit)
    assert block.window == window
    with torch.no_grad():
        assert same(block(*sampling.operands), sampling.ordinary())


def test_a_window_needs_a_step() -> None:
    with pytest.raises(ValueError, match="no progress"):
        solve(made_loop(), window=0)


def test_an_operand_that_was_expanded_when_recorded_may_be_dense() -> None:
    """A loop within a loop is recorded at one step of the outer one, and called with the operands of all."""
    sampling = made_loop(size=6)
    loop, noise = sampling.loop, sampling.operands[1]
    (node,) = (
        node
        for node, binding in zip(loop.body.graph.find_nodes(op="placeholder"), loop.bindings, strict=True)
        if isinstance(binding, Scanned)
    )
    spec = node.meta["spec"]
    node.meta["spec"] = TensorSpec(spec.shape, spec.dtype, spec.device, (0,) * len(spec.shape))
    proof = prove(loop, sampling.known)
    assert isinstance(proof, CausalityProof), proof
    block = JacobiWrites(proof)
    first = noise[(slice(None), *[slice(0, 1)] * len(spec.shape))]
    for given, in_order in (
        (noise, True),
        (first.expand(noise.shape), False),
        (first.expand(noise.shape).clone(), False),
    ):
        operands = [sampling.operands[0], given, *sampling.operands[2:]]
        with torch.no_grad():
            assert same(block(*operands), loop(*operands))
        assert block.last is not None
        assert (block.last.certificate is Certificate.SEQUENTIAL) is in_order
