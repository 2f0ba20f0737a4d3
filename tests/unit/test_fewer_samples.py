"""Samples that are final are left out of later sweeps: which, how many, with which bits, and when not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from fxjacobi.causality import CausalityProof, prove
from fxjacobi.certificate import Certificate
from fxjacobi.graph import TensorSpec
from fxjacobi.sample_axis import NotPerSample, SampleAxis, axis_of_ids, resized, sample_ids, take
from fxjacobi.sampling import JacobiWrites
from fxjacobi.sampling_solve import SamplingSolve
from tests.unit.sampling_loops import Sampling, call, recorded, sampling_loop, write
from tests.unit.sampling_models import Attention, Encoder

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten
SIZE, BATCH = 24, 32


class Between(nn.Module):
    """``tanh(x W^T)``, and then something that keeps positions apart."""

    def __init__(self, then: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(SIZE, SIZE).tril(-1))
        self.table = nn.Parameter(torch.randn(3, SIZE))
        self.then = then

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.tanh(x @ self.weight.t())
        return mixed if self.then is None else self.then(mixed)


def chains(gains: torch.Tensor, then: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Sampling:
    """``x[s, t] = g[s] * then(tanh(w_t . x[s])) + noise``: a sample of gain 0 is final after two sweeps."""
    net, tensors = recorded(Between(then), torch.zeros(BATCH, SIZE))

    def body(x: Any, t: Any, n: Any, g: Any, *weights: Any) -> Any:
        scaled = call(aten.mul.Tensor, call(aten.select.int, net(x, *weights), 1, t), g)
        return write(x, call(aten.add.Tensor, scaled, n), (None, t))

    noise = torch.randn(SIZE, BATCH, generator=torch.Generator().manual_seed(2))
    return sampling_loop(body, torch.zeros(BATCH, SIZE), [range(SIZE)], noise, [gains, *tensors])


def few_of_many(active: int) -> torch.Tensor:
    gains = torch.zeros(BATCH)
    gains[torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))[:active]] = 1.5
    return gains


class Counted(nn.Module):
    """A network that notes how many samples it is given."""

    def __init__(self, network: nn.Module, seen: list[int]) -> None:
        super().__init__()
        self.network = network
        self.seen = seen

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> Any:
        self.seen.append(len(x))
        return self.network(x, *others)


class Smeared(nn.Module):
    """A network whose results are off by a little, from the ``after``-th evaluation on."""

    def __init__(self, network: nn.Module, after: int) -> None:
        super().__init__()
        self.network = network
        self.left = after

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> Any:
        self.left -= 1
        *sources, flags = self.network(x, *others)
        return (*(source * (1.0 if self.left >= 0 else 1.0001) for source in sources), flags)


def block_of(sampling: Sampling, **options: Any) -> JacobiWrites:
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof), proof
    return JacobiWrites(proof, measure=False, **options)


def replace_network(block: JacobiWrites, network: nn.Module) -> None:
    block.add_module("network", network)


def left_out(block: JacobiWrites) -> bool:
    return block.fewer is not None


def solved(block: JacobiWrites, sampling: Sampling) -> torch.Tensor:
    with torch.no_grad():
        (found,) = block(*sampling.operands)
    assert torch.equal(found, sampling.ordinary()[0])
    return found  # type: ignore[no-any-return]


def active_of(block: JacobiWrites) -> tuple[int, ...]:
    assert block.last is not None
    return block.last.active


@pytest.mark.parametrize("active", [1, 5, 16])
def test_later_sweeps_run_fewer_samples_and_the_last_one_all(active: int) -> None:
    sampling = chains(few_of_many(active))
    block, seen = block_of(sampling), list[int]()
    replace_network(block, Counted(block.network, seen))
    solved(block, sampling)  # the first call compares each size with the whole
    assert block.fewer is not None
    part: JacobiWrites | None = block.fewer.block
    while part is not None:
        replace_network(part, Counted(part.network, seen))
        part = part.fewer.block if part.fewer is not None and part.fewer.checked else None
    seen.clear()
    solved(block, sampling)
    assert tuple(seen) == active_of(block)
    assert seen[0] == seen[-1] == BATCH
    assert min(seen) <= max(4, 2 * active)
    assert sum(seen) < 0.75 * BATCH * len(seen)
    assert block.last is not None
    assert block.last.certificate is Certificate.REPEATED
    assert block.last.prefixes[-1] == SIZE


def test_samples_that_all_need_long_stay() -> None:
    sampling = chains(torch.full((BATCH,), 1.5))
    block = block_of(sampling)
    solved(block, sampling)
    assert set(active_of(block)[:6]) == {BATCH}


def test_nothing_is_left_out_where_that_is_not_wanted() -> None:
    sampling = chains(few_of_many(2))
    block = block_of(sampling, drop=False)
    solved(block, sampling)
    assert block.fewer is None
    assert not active_of(block)


def test_other_bits_in_the_first_sweep_of_a_size_refuse_it() -> None:
    sampling = chains(few_of_many(3))
    block = block_of(sampling)
    assert block.fewer is not None
    replace_network(block.fewer.block, Smeared(block.fewer.block.network, 0))
    for _ in range(2):
        solved(block, sampling)
        assert set(active_of(block)) == {BATCH}
    assert "do not have the bits" in block.reason


def test_other_bits_later_are_found_by_the_last_sweep() -> None:
    sampling = chains(few_of_many(16))
    block = block_of(sampling)
    assert block.fewer is not None
    replace_network(block.fewer.block, Smeared(block.fewer.block.network, 3))
    solved(block, sampling)
    assert min(active_of(block)) == BATCH // 2  # it was used, and its answer was not believed
    assert not left_out(block)
    assert "differed" in block.reason


@pytest.mark.parametrize("window", [None, 7])
def test_with_a_window_too(window: int | None) -> None:
    sampling = chains(few_of_many(3))
    block = block_of(sampling, window=window)
    for _ in range(2):
        solved(block, sampling)


MIXING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda y: y - y.mean(0, keepdim=True),
    "flip": lambda y: y.flip(0),
    "roll": lambda y: y.roll(1, 0),
    "softmax": lambda y: y.softmax(0),
    "part": lambda y: y[:1].expand(BATCH, SIZE) + y,
    "first half": lambda y: torch.cat([y[: BATCH // 2], y[: BATCH // 2]]),
    "cumsum": lambda y: y.cumsum(0),
    "order": lambda y: y.sort(0).values,
    "swapped": lambda y: y.view(2, BATCH // 2, SIZE).transpose(0, 1).reshape(BATCH, SIZE) + y,
    "batch norm": lambda y: F.batch_norm(y, None, None, training=True),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_samples_is_refused_and_named(name: str) -> None:
    sampling = chains(few_of_many(2), MIXING[name])
    block = block_of(sampling)
    assert block.fewer is None
    assert f"each sweep runs all {BATCH} samples: " in block.reason
    solved(block, sampling)


def heads(y: torch.Tensor) -> torch.Tensor:
    """Attention over two channels that every position has of its own."""
    q = torch.stack([y, -y], -1).view(BATCH * SIZE, 1, 2, 1)
    return F.scaled_dot_product_attention(q, q, q).view(BATCH, SIZE, 2)[..., 0]


def image(y: torch.Tensor) -> torch.Tensor:
    pixels = F.conv2d(y.view(BATCH, 1, 4, 6), torch.full((8, 1, 1, 1), 0.5))
    return F.group_norm(pixels.permute(0, 2, 3, 1).reshape(-1, 8, 1, 1), 2).mean((1, 2, 3)).view(BATCH, SIZE) + y


def guided(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.lerp(a, b, 2.0)


KEEPING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "merged": lambda y: F.layer_norm(y.reshape(BATCH * SIZE, 1).expand(-1, 4), (4,)).sum(1).view(BATCH, SIZE) + y,
    "transposed": lambda y: y.t().exp().t() - 1,
    "guidance": lambda y: guided(*torch.cat([y, -y]).sin().chunk(2)),
    "sliced twice": lambda y: torch.cat([y, y])[BATCH:],
    "stacked": lambda y: torch.stack([y, -y], 1).amax(1) - torch.stack([y, -y]).logsumexp(0),
    "sorted": lambda y: torch.stack([y, -y, 2 * y], 2).topk(2, 2).values.sum(2),
    "table": lambda y: F.embedding((y > 0).long(), torch.arange(2.0).view(2, 1) + 0.5).squeeze(2) * y,
    "indexed": lambda y: (torch.arange(2.0) + 0.5)[(y > 0).long()] * y[:, torch.arange(SIZE)],
    "gathered": lambda y: torch.stack([y, -y], 2).gather(2, (y > 0).long().unsqueeze(2)).squeeze(2),
    "scattered": lambda y: torch.zeros(BATCH, SIZE, 2).scatter(2, (y > 0).long().unsqueeze(2), y.unsqueeze(2)).sum(2),
    "padded": lambda y: F.pad(y.unsqueeze(2), (1, 2)).sum(2),
    "where": lambda y: torch.where(torch.arange(BATCH)[:, None] >= 0, y, torch.zeros(BATCH, 1)),
    "products": lambda y: torch.baddbmm(torch.zeros(BATCH, SIZE, 1), y.unsqueeze(2), torch.ones(BATCH, 1, 1)).squeeze(
        2
    ),
    "written": lambda y: (
        torch.zeros(BATCH, 2, SIZE).select_scatter(y, 1, 0).slice_scatter(-y.unsqueeze(1), 1, 1).prod(1)
    ),
    "heads": heads,
    "image": image,
}


@pytest.mark.parametrize("name", KEEPING)
def test_what_keeps_samples_apart_is_left_to_fewer(name: str) -> None:
    sampling = chains(few_of_many(2), KEEPING[name])
    block = block_of(sampling)
    assert block.fewer is not None, block.reason
    for _ in range(2):
        solved(block, sampling)
    assert min(active_of(block)) < BATCH, block.reason
    assert block.last is not None
    assert block.last.completed == 0


@pytest.mark.parametrize(
    "net",
    [Attention("causal", length=SIZE), Attention("manual", length=SIZE), Attention("mask", length=SIZE),
     Encoder(length=SIZE)],
    ids=["causal", "manual", "mask", "encoder"],
)  # fmt: skip
def test_transformers_keep_samples_apart(net: nn.Module) -> None:
    start = torch.zeros(BATCH, SIZE, dtype=torch.long)
    replay, tensors = recorded(net.eval(), start)

    def body(x: Any, t: Any, n: Any, *weights: Any) -> Any:
        logits = call(aten.select.int, replay(x, *weights), 1, t)
        return write(x, call(aten.argmax.default, call(aten.add.Tensor, logits, n), 1), (None, t))

    noise = torch.randn(SIZE, BATCH, 6, generator=torch.Generator().manual_seed(0))
    noise[:, 4:, 0] += 50.0  # most samples are sure of every token
    sampling = sampling_loop(body, start, [range(SIZE)], noise, tensors)
    block = block_of(sampling)
    assert block.fewer is not None, block.reason
    for _ in range(2):
        solved(block, sampling)


def test_axes_of_merged_dimensions() -> None:
    for axis in (SampleAxis(0), SampleAxis(1, 3), SampleAxis(1, 2, 5), SampleAxis(2, 1, 4)):
        shape = [3, 3, 3]
        shape[axis.dim] = axis.length(4)
        ids = sample_ids(shape, axis, 4)
        assert axis_of_ids(ids, 4) == axis
        value = torch.arange(ids.numel()).view(shape)
        kept = torch.tensor([1, 3])
        assert torch.equal(
            take(value, axis, kept, 4), value[torch.isin(ids, kept)].view(take(value, axis, kept, 4).shape)
        )
    assert axis_of_ids(torch.tensor([0, 1, 1, 0]), 2) is None
    assert axis_of_ids(torch.tensor([1, 0]), 2) is None


def test_strides_that_do_not_scale_are_refused() -> None:
    spec = TensorSpec((8, 3), torch.float32, torch.device("cpu"), (1, 9))
    with pytest.raises(NotPerSample, match="strides"):
        resized(spec, SampleAxis(0), 8, 4)
    assert resized(spec, SampleAxis(1), 3, 2).stride == (1, 9)


def test_a_size_that_costs_more_than_it_saves_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = chains(few_of_many(3))
    block = block_of(sampling)
    solved(block, sampling)
    assert block.fewer is not None
    assert block.fewer.checked
    block.measure = True
    monkeypatch.setattr(block.fewer.gain, "worth_using", lambda left, *, confirmed: True)
    monkeypatch.setattr(block.fewer.gain, "whole_s", 0.0)  # as if a whole sweep took no time at all
    for _ in range(6):
        solved(block, sampling)
    assert not left_out(block)
    assert "took longer than they saved" in block.reason
    assert set(active_of(block)) == {BATCH}


def test_a_sweep_of_fewer_that_is_slower_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = chains(few_of_many(3))
    block = block_of(sampling)
    block.measure = True
    assert block.fewer is not None
    block.fewer.gain.forgone_s = 100.0
    honest = SamplingSolve.sweep

    def timed(self: SamplingSolve) -> Any:
        result = honest(self)
        self.whole_s = 1.0 if self.block is block else 2.0
        return result

    monkeypatch.setattr(SamplingSolve, "sweep", timed)
    solved(block, sampling)
    assert not left_out(block)
    assert "takes 2000.000 ms, 1000.000 ms for all" in block.reason
