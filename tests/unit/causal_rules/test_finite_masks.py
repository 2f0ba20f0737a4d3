"""Masks of -1e9, -1e4 and the lowest float: proven where scores are bounded, refused where not, watched at run time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from fxjacobi.array_loop import array_loop
from fxjacobi.causal_rules.domain import Abstract, Value, constant, unknown
from fxjacobi.causal_rules.interpreter import interpret
from fxjacobi.causal_rules.interval import interval_of_value
from fxjacobi.causal_rules.magnitudes import interval_of
from fxjacobi.causal_rules.registry import Context
from fxjacobi.causality import CausalityProof, Refusal, prove
from fxjacobi.certificate import Certificate
from fxjacobi.graph import stamp_all
from fxjacobi.sampling import JacobiWrites
from tests.unit.sampling_loops import Sampling, call, recorded, same, sampling_loop, write

aten = torch.ops.aten
LOWEST = torch.finfo(torch.float32).min


class Masked(nn.Module):
    """Shifted self-attention over real values: ``(B, T) -> (B, T)``, a finite mask over what comes later."""

    mask: torch.Tensor

    def __init__(self, low: float, how: str, *, norm: bool = True, length: int = 8, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.low, self.how, self.width = low, how, width
        self.grow = nn.Linear(1, width)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.project = nn.Linear(width, 3 * width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True, dropout=0.0)
        self.head = nn.Linear(width, 1)
        self.register_buffer("mask", torch.ones(length, length).tril())
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.grow(functional.pad(x[:, :-1], (1, 0)).unsqueeze(-1)))
        above = torch.where(self.mask > 0, 0.0, self.low)
        if self.how == "multi-head":
            y = self.attention(y, y, y, attn_mask=above, need_weights=False)[0]
        elif self.how == "multi-head, weights":
            y = self.attention(y, y, y, attn_mask=above)[0]
        elif self.how == "encoder":
            y = self.layer(y, src_mask=above)
        else:
            query, key, value = self.project(y).chunk(3, -1)
            scores = query @ key.transpose(-1, -2) / self.width**0.5
            if self.how == "fused":
                y = functional.scaled_dot_product_attention(query, key, value, attn_mask=above)
            elif self.how == "fill":
                y = scores.masked_fill(self.mask == 0, self.low).softmax(-1) @ value
            elif self.how == "where":
                y = torch.where(self.mask > 0, scores, torch.full_like(self.mask, self.low)).softmax(-1) @ value
            elif self.how == "multiply":
                y = (scores * self.mask - (1 - self.mask) * -self.low).softmax(-1) @ value
            else:
                y = (scores + above).softmax(-1) @ value
        result: torch.Tensor = self.head(y).squeeze(-1)
        return result


def loop(net: nn.Module, *, batch: int = 2, length: int = 8, start: torch.Tensor | None = None) -> Sampling:
    """``x[:, t] = net(x)[:, t] + noise_t``."""
    start = torch.zeros(batch, length) if start is None else start
    replay, tensors = recorded(net, start)

    def body(x: Any, t: Any, n: Any, *weights: Any) -> Any:
        return write(x, call(aten.add.Tensor, call(aten.select.int, replay(x, *weights), 1, t), n), (None, t))

    return sampling_loop(body, start, [range(length)], torch.randn(length, len(start)), tensors)


HOW = ["fill", "add", "where", "multiply", "fused", "multi-head", "multi-head, weights", "encoder"]


@pytest.mark.parametrize("low", [-1e9, LOWEST])
@pytest.mark.parametrize("how", HOW)
def test_a_mask_that_outweighs_all_scores_is_as_good_as_infinity(how: str, low: float) -> None:
    sampling = loop(Masked(low, how))
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof), proof
    assert proof.step_ranks == (-1, *range(7))
    assert proof.limits == {"a0": 4096.0}
    with torch.no_grad():
        block = JacobiWrites(proof)
        assert same(block(*sampling.operands), sampling.ordinary())
        assert block.last is not None
        assert block.last.completed == 0


def test_masks_that_prove_themselves_need_no_limits() -> None:
    """Finite biases beside a mask of -inf (ALiBi, arXiv 2108.12409) may outweigh something too: it does not matter."""
    distance = (torch.arange(8)[:, None] - torch.arange(8)[None]).float()
    replay, tensors = recorded(Biased(distance), torch.zeros(2, 8))

    def body(x: Any, t: Any, n: Any, *weights: Any) -> Any:
        return write(x, call(aten.add.Tensor, call(aten.select.int, replay(x, *weights), 1, t), n), (None, t))

    sampling = sampling_loop(body, torch.zeros(2, 8), [range(8)], torch.randn(8, 2), tensors)
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof), proof
    assert proof.limits == {}


class Biased(nn.Module):
    """Attention over shifted values with a bias of -100 a step, and -inf on what comes later."""

    bias: torch.Tensor

    def __init__(self, distance: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", (-100 * distance).masked_fill(distance < 0, -torch.inf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.pad(x[:, :-1], (1, 0)).unsqueeze(-1).tanh()
        seen: torch.Tensor = (y @ y.mT + self.bias).softmax(-1) @ y
        return seen.squeeze(-1)


def test_deep_networks_rest_on_normalisations_that_do_not_blow_rounding_up() -> None:
    """Scores of weights this large are bounded only if a layer norm is about as large as in exact arithmetic."""
    net = Masked(-1e9, "fused")
    with torch.no_grad():
        net.grow.weight.mul_(1e4)
        net.project.weight.mul_(30)
    sampling = loop(net)
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof), proof
    (norm,) = proof.limits
    assert "layer_norm" in norm
    assert 1.25 * 8**0.5 < proof.limits[norm] < 1.3 * 8**0.5
    with torch.no_grad():
        block = JacobiWrites(proof)
        assert same(block(*sampling.operands), sampling.ordinary())
        assert block.last is not None
        assert block.last.completed == 0
        # The limit is looked at: under one that the rows exceed, the loop is run in order.
        object.__setattr__(proof, "limits", {norm: 1.0})
        block = JacobiWrites(proof)
        assert same(block(*sampling.operands), sampling.ordinary())
        assert block.last is not None
        assert block.last.certificate is Certificate.NOT_FINITE


def test_a_proof_of_the_same_loop_with_other_names_keeps_its_limits() -> None:
    sampling = loop(Masked(-1e9, "add"))
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof)
    moved = proof.of(array_loop(sampling.loop), {proof.kills[0]: "elsewhere"})
    assert moved.kills == ("elsewhere",)
    assert moved.limits == proof.limits == {"a0": 4096.0}
    assert "keeps to its limits (1)" in str(moved)


@pytest.mark.parametrize("how", ["fill", "add", "fused", "multi-head"])
def test_a_mask_that_scores_may_outweigh_is_refused_with_the_numbers(how: str) -> None:
    sampling = loop(Masked(-70.0, how))
    refusal = prove(sampling.loop, sampling.known)
    assert isinstance(refusal, Refusal)
    assert "a finite mask is given, but it does not outweigh scores that may differ by" in str(refusal)
    assert refusal.step == 0


def test_without_the_weights_no_bound_is_known() -> None:
    sampling = loop(Masked(-1e9, "add", width=64))
    only_mask = [unknown(value.shape) for value in sampling.known[:-1]] + sampling.known[-1:]
    assert isinstance(prove(sampling.loop, sampling.known), CausalityProof)
    refusal = prove(sampling.loop, only_mask)
    assert isinstance(refusal, Refusal)
    assert "finite mask" in str(refusal)


def bilinear(start: torch.Tensor, noise: torch.Tensor) -> Sampling:
    """Scores ``x_i x_j`` under a mask of -1e9, which large values outweigh."""
    length = start.shape[1]
    mask = torch.full((length, length), -1e9).triu(1)

    def body(x: Any, t: Any, n: Any, m: Any) -> Any:
        shifted = call(aten.constant_pad_nd.default, call(aten.slice.Tensor, x, 1, 0, length - 1), [1, 0])
        column, row = call(aten.unsqueeze.default, shifted, 2), call(aten.unsqueeze.default, shifted, 1)
        weights = call(aten._softmax.default, call(aten.add.Tensor, call(aten.bmm.default, column, row), m), -1, False)
        seen = call(aten.squeeze.dim, call(aten.bmm.default, weights, column), 2)
        value = call(aten.sin.default, call(aten.select.int, seen, 1, t))
        return write(x, call(aten.add.Tensor, value, n), (None, t))

    return sampling_loop(body, start, [range(length)], noise, [mask])


@pytest.mark.parametrize("where", ["initial", "sampled", "nowhere"])
def test_values_past_the_limit_are_noticed_at_run_time(where: str) -> None:
    start, noise = torch.zeros(1, 6), torch.ones(6, 1)
    if where == "initial":
        start[0, 3:] = 3e9  # the ordinary run sees these until they are written, and they win against the mask
    elif where == "sampled":
        noise[2] = 1e5
    sampling = bilinear(start, noise)
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof), proof
    assert proof.limits == {"a0": 4096.0}
    with torch.no_grad():
        block = JacobiWrites(proof)
        assert same(block(*sampling.operands), sampling.ordinary())
        assert block.last is not None
        assert (block.last.certificate is Certificate.NOT_FINITE) == (where != "nowhere")


def test_without_the_limit_the_answer_would_be_wrong() -> None:
    start, noise = torch.zeros(1, 6), torch.ones(6, 1)
    start[0, 3:] = 3e9
    sampling = bilinear(start, noise)
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof)
    object.__setattr__(proof, "limits", {})
    with torch.no_grad():
        block = JacobiWrites(proof)
        block.checked = True  # the replay of single steps after the first call would notice this one too
        assert not same(block(*sampling.operands), sampling.ordinary())


def test_an_input_past_its_limit_is_noticed() -> None:
    """A bias of the scores that is an input, not a constant, is limited too."""
    length = 6
    mask = torch.full((length, length), -1e9).triu(1)

    def body(x: Any, t: Any, n: Any, m: Any, extra: Any) -> Any:
        shifted = call(aten.constant_pad_nd.default, call(aten.slice.Tensor, x, 1, 0, length - 1), [1, 0])
        scores = call(
            aten.add.Tensor,
            call(aten.add.Tensor, extra, m),
            call(aten.tanh.default, call(aten.unsqueeze.default, shifted, 1)),
        )
        seen = call(
            aten.bmm.default, call(aten._softmax.default, scores, -1, False), call(aten.unsqueeze.default, shifted, 2)
        )
        chosen = call(aten.select.int, call(aten.squeeze.dim, seen, 2), 1, t)
        return write(x, call(aten.add.Tensor, chosen, n), (None, t))

    for size in (1.0, 3e9):
        extra = size * torch.rand(length, length)
        sampling = sampling_loop(body, torch.zeros(2, length), [range(length)], torch.randn(length, 2), [mask, extra])
        sampling.known[-1] = unknown(extra.shape)
        proof = prove(sampling.loop, sampling.known)
        assert isinstance(proof, CausalityProof), proof
        assert set(proof.limits.values()) == {4096.0}
        with torch.no_grad():
            block = JacobiWrites(proof)
            assert same(block(*sampling.operands), sampling.ordinary())
            assert block.last is not None
            assert (block.last.certificate is Certificate.NOT_FINITE) == (size > 1)


@pytest.mark.parametrize("count", [2, 16, 64, 1000])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-12])
def test_the_bound_of_a_layer_norm_holds_where_rounding_is_all_there_is(count: int, epsilon: float) -> None:
    torch.manual_seed(count)
    graph = recorded_graph(lambda x: functional.layer_norm(x, (count,), eps=epsilon), torch.zeros(4, count))
    array = next(iter(graph.graph.nodes))
    context = Context(0, assumable={array: 4096.0})
    env = interpret(context, graph, [unknown((4, count))])
    with context.within(env):
        found = interval_of(context, next(n for n in graph.graph.nodes if n.target is aten.native_layer_norm.default))
    assert found is not None
    worst = 0.0
    for scale in (0.0, 1e-7, 2e-7, 1e-6, 1e-4, 1.0):
        for centre in (4000.0, 1.0, 0.0):
            x = (centre * (1 + scale * torch.randn(200, count))).clamp(-4096, 4096)
            x[:, -1] = centre * (1 - 6e-8)
            worst = max(worst, float(functional.layer_norm(x, (count,), eps=epsilon).norm(dim=-1).max()))
    assert 0.9 * count**0.5 < worst <= found.norm


def recorded_graph(function: Any, example: torch.Tensor) -> fx.GraphModule:
    graph = make_fx(function)(example)
    stamp_all(graph, [example])
    return graph


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_root_mean_square_norm_written_out_is_bounded(eps: float) -> None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    graph = recorded_graph(norm, torch.zeros(3, 16))
    context = Context(0, assumable={next(iter(graph.graph.nodes)): 4096.0})
    values: list[Value] = [unknown((3, 16))]
    with context.within(interpret(context, graph, values)):
        found = interval_of(context, graph.graph.output_node().args[0])
    assert found is not None
    assert found.size < 4.1
    x = torch.eye(16) * 4096
    assert float(norm(x).abs().max()) <= found.size


def test_a_row_of_nothing_but_masked_entries_depends_on_all_of_them() -> None:
    graph = recorded_graph(lambda x: (x + torch.full((3, 3), -1e9)).softmax(-1), torch.zeros(3, 3))
    context = Context(2, assumable={next(iter(graph.graph.nodes)): 4096.0})
    rank = torch.arange(3, dtype=torch.int32).expand(3, 3)
    env = interpret(context, graph, [Abstract(rank)])
    result = env[graph.graph.output_node().args[0]]  # type: ignore[index]
    assert isinstance(result, Abstract)
    assert bool((result.rank == 2).all())
    assert not context.limits
    assert "does not outweigh" in next(iter(context.notes.values()))


def test_log_softmax_keeps_what_a_masked_entry_depends_on() -> None:
    """``log_softmax`` at a masked entry is the entry less the row's sum: not a constant, as softmax's zero is."""
    mask = torch.tensor([0.0, 0.0, -1e9])
    graph = recorded_graph(lambda x: (x.tanh() + mask).log_softmax(-1), torch.zeros(1, 3))
    array = next(iter(graph.graph.nodes))
    context = Context(2, assumable={array: 4096.0})
    env = interpret(context, graph, [Abstract(torch.arange(3, dtype=torch.int32).expand(1, 3))])
    result = env[graph.graph.output_node().args[0]]  # type: ignore[index]
    assert isinstance(result, Abstract)
    assert result.rank.tolist() == [[1, 1, 2]]


def test_constants_that_are_not_finite_give_no_interval() -> None:
    assert interval_of_value(torch.tensor([1.0, float("nan")]), frozenset()) is None
    expanded = interval_of_value(torch.tensor([3.0]).expand(4), frozenset())
    assert expanded is not None
    assert expanded.norm == pytest.approx(6.0, rel=2e-2)
    assert expanded.norm >= 6
    assert constant(torch.ones(2)).constant


def test_a_product_with_a_vector_has_no_rows() -> None:
    """Its elements are bounded, but they make one long row together."""
    graph = recorded_graph(lambda x: torch.mv(x.tanh(), torch.ones(3)), torch.zeros(50, 3))
    context = Context(0)
    with context.within(interpret(context, graph, [unknown((50, 3))])):
        found = interval_of(context, graph.graph.output_node().args[0])
    assert found is not None
    assert 3 <= found.size < 3.2
    assert found.rows(50)[0] >= float(torch.full((50,), 3.0).norm())
