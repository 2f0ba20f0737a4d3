"""What the causal-rank analysis proves, refuses, and says."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from fxjacobi import ops
from fxjacobi.causality import CausalityProof, Refusal, prove
from fxjacobi.graph import spec_of_value, stamp, stamp_all
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked, Step
from tests.unit.sampling_loops import Sampling, call, recorded, sampling_loop, write
from tests.unit.sampling_models import made

aten = torch.ops.aten


def loop_of(net: nn.Module, start: torch.Tensor, *, dim: int = 1, shift: int = 0) -> Sampling:
    """``x[:, t] = net(x)[:, t + shift]`` plus noise, first output channel where there are several."""
    replay, tensors = recorded(net, start)
    size = start.shape[dim]

    def body(x: Any, t: Any, at: Any, n: Any, *weights: Any) -> Any:
        out = call(aten.select.int, replay(x, *weights), dim, at)
        return write(x, call(aten.add.Tensor, out, n), (None, t))

    at = [min(t + shift, size - 1) for t in range(size)]
    return sampling_loop(body, start, [range(size), at], torch.randn(size, len(start)), tensors)


def proven(sampling: Sampling) -> CausalityProof:
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof), proof
    return proof


def refused(sampling: Sampling) -> Refusal:
    refusal = prove(sampling.loop, sampling.known)
    assert isinstance(refusal, Refusal)
    return refusal


class FirstHalf(nn.Module):
    """The means of a MADE."""

    def __init__(self, size: int, hidden: int = 24) -> None:
        super().__init__()
        self.net = made(size, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean: torch.Tensor = self.net(x).chunk(2, -1)[0]
        return mean


def test_a_proof_says_what_it_rests_on() -> None:
    proof = proven(loop_of(FirstHalf(8), torch.zeros(2, 8)))
    assert proof.step_ranks == (-1, *range(7))
    assert proof.depth == 8
    assert proof.reads
    assert set(proof.kills) == {"addmm_default", "addmm_default_1", "addmm_default_2"}
    assert proof.unknown_ops == ()
    assert torch.equal(proof.position_ranks, torch.arange(8, dtype=torch.int32).expand(2, 8))
    # Ranks of every element of the network can be asked for: unit u of the first layer sees inputs up to u % 7.
    assert torch.equal(proof.ranks["addmm_default"][0], (torch.arange(24) % 7).to(torch.int32))


def test_without_the_masks_values_there_is_no_proof() -> None:
    sampling = loop_of(FirstHalf(8), torch.zeros(2, 8))
    refusal = prove(sampling.loop)
    assert isinstance(refusal, Refusal)
    assert refusal.step == 0
    assert refusal.rank == 7


def test_depth_of_independent_steps_is_one() -> None:
    class Independent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.new_ones(x.shape).cumsum(1)

    assert proven(loop_of(Independent(), torch.zeros(2, 5))).depth == 1


def test_looking_ahead_by_one_is_refused() -> None:
    assert proven(loop_of(FirstHalf(8), torch.zeros(2, 8))).depth == 8
    refusal = refused(loop_of(FirstHalf(8), torch.zeros(2, 8), shift=1))
    assert refusal.element == (0, 0)
    assert refusal.step == 0
    assert refusal.rank == 0
    assert "written at step 0, depends on itself" in str(refusal)


def test_a_leaking_mask_entry_names_the_element_and_the_layer() -> None:
    net = FirstHalf(8)
    net.net[2].mask[2, 5] = 1  # type: ignore[operator]
    refusal = refused(loop_of(net, torch.zeros(2, 8)))
    # Unit 2 of the second layer is read from output 3 on.
    assert refusal.element == (0, 3)
    assert refusal.step == 3
    assert refusal.rank == 5
    assert refusal.node == "addmm_default_1"
    assert refusal.op == "aten.addmm.default"


def test_a_refusal_need_not_be_explained() -> None:
    sampling = loop_of(FirstHalf(8), torch.zeros(2, 8), shift=1)
    refusal = prove(sampling.loop, sampling.known, thorough=False)
    assert isinstance(refusal, Refusal)
    assert (refusal.element, refusal.step, refusal.rank) == ((0, 0), 0, 0)
    assert refusal.node is None
    assert "written at step 0, depends on step 0" in str(refusal)


@pytest.mark.parametrize(
    ("net", "op"),
    [
        (nn.Sequential(nn.Linear(6, 6)), "aten.addmm.default"),
        (nn.Softmax(-1), "aten._softmax.default"),
        (nn.LayerNorm(6, elementwise_affine=False), "aten.native_layer_norm.default"),
    ],
)
def test_a_dense_network_is_refused(net: nn.Module, op: str) -> None:
    refusal = refused(loop_of(net, torch.zeros(2, 6)))
    assert refusal.op == op
    assert refusal.step == 0
    assert refusal.rank == 5


def test_an_operation_without_a_rule_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q: torch.Tensor = torch.linalg.qr(x.t() @ x + torch.ones_like(x[0]).diag())[0]
            return q[:2]

    sampling = loop_of(Odd(), torch.zeros(2, 6))
    refusal = refused(sampling)
    assert [one.op for one in refusal.unknown_ops] == ["aten.linalg_qr.default"]
    assert "aten.linalg_qr.default" in str(refusal)


def test_an_unknown_operation_on_earlier_positions_only_does_no_harm() -> None:
    # Conservative is not everything: what does not touch the array has no rank.
    class Aside(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            fixed = torch.linalg.qr(torch.ones_like(x[0]).diag())[0]
            shifted: torch.Tensor = functional.pad(x, (1, 0))[:, :-1] * fixed[0, 0]
            return shifted

    assert proven(loop_of(Aside(), torch.zeros(2, 6))).depth == 6


def test_what_is_no_sampling_loop_says_so() -> None:
    def grows(x: Any, t: Any) -> Any:
        return call(aten.add.Tensor, x, t)

    refusal = prove(sampling_loop(grows, torch.zeros(2, 4), [range(4)]).loop)
    assert isinstance(refusal, Refusal)
    assert "not written in part" in str(refusal)

    def twice(x: Any, t: Any) -> Any:
        return write(x, call(aten.select.int, x, 1, t), (None, 0))

    refusal = prove(sampling_loop(twice, torch.zeros(2, 4), [range(4)]).loop)
    assert isinstance(refusal, Refusal)
    assert "more than once" in str(refusal)

    def draws(x: Any, t: Any) -> Any:
        return write(x, call(aten.rand_like.default, call(aten.select.int, x, 1, t)), (None, t))

    refusal = prove(sampling_loop(draws, torch.zeros(2, 4), [range(4)]).loop)
    assert isinstance(refusal, Refusal)
    assert "draws random numbers" in str(refusal)
    assert refusal.op == "aten.rand_like.default"


def test_two_carried_arrays_are_refused() -> None:
    sampling = loop_of(FirstHalf(6), torch.zeros(2, 6))
    body = sampling.loop.body
    bindings = [Carried(0, 1, (1,)) if isinstance(b, Scanned) else b for b in sampling.loop.bindings]
    refusal = prove(Loop(body, 6, bindings, sampling.loop.results))
    assert isinstance(refusal, Refusal)
    assert "carries 2 values" in str(refusal)


def test_an_output_that_sees_the_future_is_refused() -> None:
    size = 6

    def body(x: Any, t: Any, n: Any) -> Any:
        total = call(aten.sum.dim_IntList, x, [1])
        return write(x, n, (None, t)), call(aten.mul.Tensor, total, call(aten.select.int, x, 1, t))

    sampling = sampling_loop(
        body, torch.zeros(2, size), [range(size)], torch.randn(size, 2), results=[Step(0, 5), Stacked(1)]
    )
    refusal = refused(sampling)
    assert refusal.op == "aten.sum.dim_IntList"
    assert refusal.element is None


def test_recurrent_layers_and_inner_loops() -> None:
    step = fx.Graph()
    state, value = step.placeholder("state"), step.placeholder("value")
    total = step.call_function(aten.tanh.default, (step.call_function(aten.add.Tensor, (state, value)),))
    step.output((total,))
    example = torch.zeros(2)
    for node in step.nodes:
        if node.op != "output":
            stamp(node, spec_of_value(example))
    inner = Loop(fx.GraphModule(nn.Module(), step), 6, [Carried(0, 1, (0,)), Scanned(1, 1, range(6))], [Stacked(0)])

    graph = fx.Graph()
    x, t, n, zero = (graph.placeholder(name) for name in ("x", "t", "n", "zero"))
    called = graph.call_module("inner", (zero, x))
    stacked = graph.call_function(operator.getitem, (called, 0))
    padded = graph.call_function(aten.constant_pad_nd.default, (stacked, [0, 0, 1, 0]))
    chosen = graph.call_function(aten.select.int, (padded, 0, t))
    drawn = graph.call_function(aten.add.Tensor, (chosen, n))
    graph.output((graph.call_function(ops.write, (x, drawn, (None, t))),))
    root = nn.Module()
    root.add_module("inner", inner)
    module = fx.GraphModule(root, graph)

    stamp_all(module, [torch.zeros(2, 6), 3, torch.zeros(2), torch.zeros(2)])
    loop = Loop(
        module, 6, [Carried(0, 1, (0,)), Literal(tuple(range(6))), Scanned(1, 0, range(6)), Invariant(2)], [Step(0, 5)]
    )
    proof = prove(loop)
    assert isinstance(proof, CausalityProof), proof
    assert proof.step_ranks == (-1, 0, 1, 2, 3, 4)
