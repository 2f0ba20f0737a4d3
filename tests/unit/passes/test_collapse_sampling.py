"""From ordinary Python to Jacobi sweeps: the same sample from the same seed, or a refusal that says why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import fx, nn
from torch.distributions import Categorical, Normal

from fxjacobi.bits import first_difference
from fxjacobi.loops import Loop
from fxjacobi.passes.collapse_sampling import CollapseSampling
from fxjacobi.sampling import JacobiWrites
from tests.unit.sampling_loops import rolled
from tests.unit.sampling_models import Attention, Encoder, Shifted, made, pixel_cnn

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 12


def gaussian(net: nn.Module, order: list[int], batch: int) -> torch.Tensor:
    x = torch.zeros(batch, len(order))
    for t in order:
        mean, scale = net(x).chunk(2, -1)
        x[:, t] = mean[:, t] + scale[:, t].exp() * torch.randn(batch)
    return x


def logistic(net: nn.Module, batch: int, size: int) -> torch.Tensor:
    x = torch.zeros(batch, size)
    for t in range(size):
        mean, scale = net(x).chunk(2, -1)
        x[:, t] = mean[:, t] + scale[:, t].exp() * torch.rand(batch).logit()
    return x


def raster(net: nn.Module, batch: int, side: int) -> torch.Tensor:
    x = torch.zeros(batch, 1, side, side)
    for i in range(side):
        for j in range(side):
            mean, scale = net(x)[:, :, i, j].unbind(1)
            x[:, 0, i, j] = mean + scale.exp() * torch.randn(batch)
    return x


def tokens(net: nn.Module, batch: int) -> torch.Tensor:
    x = torch.zeros(batch, SIZE, dtype=torch.long)
    for t in range(SIZE):
        x[:, t] = torch.multinomial((net(x)[:, t] / 0.8).softmax(-1), 1)[:, 0]
    return x


def categorical(net: nn.Module, batch: int) -> torch.Tensor:
    x = torch.zeros(batch, SIZE, dtype=torch.long)
    for t in range(SIZE):
        x[:, t] = Categorical(logits=net(x)[:, t]).sample()
    return x


def greedy(net: nn.Module, batch: int) -> torch.Tensor:
    x = torch.zeros(batch, SIZE, dtype=torch.long)
    for t in range(SIZE):
        x[:, t] = net(x)[:, t].argmax(-1)
    return x


def gumbel(net: nn.Module, batch: int) -> torch.Tensor:
    x = torch.zeros(batch, SIZE, dtype=torch.long)
    for t in range(SIZE):
        x[:, t] = (net(x)[:, t] - torch.rand(batch, 6).log().neg().log()).argmax(-1)
    return x


def top_k(net: nn.Module, batch: int) -> torch.Tensor:
    x = torch.zeros(batch, SIZE, dtype=torch.long)
    for t in range(SIZE):
        logits = net(x)[:, t]
        least = logits.topk(3, -1).values[:, -1:]
        x[:, t] = torch.multinomial(logits.masked_fill(logits < least, -torch.inf).softmax(-1), 1).squeeze(-1)
    return x


def nucleus(net: nn.Module, batch: int) -> torch.Tensor:
    x = torch.zeros(batch, SIZE, dtype=torch.long)
    for t in range(SIZE):
        p, index = net(x)[:, t].softmax(-1).sort(-1, descending=True)
        p = p.masked_fill(p.cumsum(-1) - p > 0.8, 0.0)
        x[:, t] = index.gather(-1, torch.multinomial(p, 1)).squeeze(-1)
    return x


def bernoulli(net: nn.Module, batch: int) -> torch.Tensor:
    x = torch.zeros(batch, SIZE)
    for t in range(SIZE):
        x[:, t] = torch.bernoulli(net(x)[:, t].sigmoid())
    return x


def conditioned(net: nn.Module, y: torch.Tensor) -> torch.Tensor:
    x = torch.zeros_like(y)
    for t in range(y.shape[1]):
        mean, scale = net(x).chunk(2, -1)
        x[:, t] = mean[:, t] * y[:, t] + scale[:, t].exp() * torch.randn(len(y))
    return x


def painted(net: nn.Module, given: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    x = given * known
    for t in range(given.shape[1]):
        mean, scale = net(x).chunk(2, -1)
        value = mean[:, t] + scale[:, t].exp() * torch.randn(len(given))
        x[:, t] = torch.where(known[:, t] > 0, x[:, t], value)
    return x


def suffix(net: nn.Module, given: torch.Tensor, prefix: int) -> torch.Tensor:
    x = given.clone()
    for t in range(prefix, given.shape[1]):
        mean, scale = net(x).chunk(2, -1)
        x[:, t] = mean[:, t] + scale[:, t].exp() * torch.randn(len(given))
    return x


def with_log_probability(net: nn.Module, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, total = torch.zeros(batch, SIZE), torch.zeros(batch)
    for t in range(SIZE):
        mean, scale = net(x).chunk(2, -1)
        normal = Normal(mean[:, t], scale[:, t].exp())
        x[:, t] = normal.sample()
        total = total + normal.log_prob(x[:, t])
    return x, total


class Permuted(nn.Module):
    """A network whose inputs and outputs come in another order."""

    order: torch.Tensor
    inverse: torch.Tensor

    def __init__(self, net: nn.Module, order: list[int]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("inverse", torch.tensor(order).argsort())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.net(x[:, self.order]).chunk(2, -1)
        return torch.cat([first[:, self.inverse], second[:, self.inverse]], -1)


def solved(
    function: Callable[..., Any], *args: Any, passes: CollapseSampling | None = None
) -> tuple[fx.GraphModule, bool]:
    """Record and collapse; return the module, and whether it gives the ordinary result from the same seed."""
    with torch.no_grad():
        torch.manual_seed(5)
        module = (passes or CollapseSampling()).run(rolled(function, *args)).module
        inputs = [a for a in args if isinstance(a, torch.Tensor)]
        equal = True
        for seed in (5, 6):
            torch.manual_seed(seed)
            wanted = function(*args)
            torch.manual_seed(seed)
            found = module(*inputs)
            wanted = wanted if isinstance(wanted, tuple) else (wanted,)
            equal &= all(same(a, b) for a, b in zip(found, wanted, strict=True))
    return module, equal


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return first_difference(found, wanted) is None


def block_of(module: fx.GraphModule) -> JacobiWrites:
    blocks = [child for child in module.children() if isinstance(child, JacobiWrites)]
    assert len(blocks) == 1, [getattr(child, "reason", "") for child in module.children()]
    return blocks[0]


ORDER = [3, 7, 0, 11, 5, 1, 9, 2, 10, 4, 8, 6]

CAUSAL: dict[str, tuple[Any, ...]] = {
    "made": (logistic, made(SIZE, 32), 3, SIZE),
    "permuted": (gaussian, Permuted(made(SIZE, 32), ORDER), ORDER, 3),
    "masked_convolutions": (raster, pixel_cnn(), 2, 5),
    "shifted_convolutions": (raster, Shifted(), 2, 5),
    "batch_norm_in_evaluation": (raster, pixel_cnn(norm=nn.BatchNorm2d(8)).eval(), 2, 5),
    "multinomial": (tokens, Attention("causal"), 3),
    "categorical": (categorical, Attention("mask"), 3),
    "greedy": (greedy, Attention("plain"), 3),
    "gumbel": (gumbel, Attention("causal"), 3),
    "top_k": (top_k, Encoder().eval(), 3),
    "nucleus": (nucleus, Attention("causal"), 3),
    "bernoulli": (bernoulli, made(SIZE, 32), 3),
    "conditioned": (conditioned, made(SIZE, 32), torch.randn(3, SIZE)),
    "painted": (painted, made(SIZE, 32), torch.randn(3, SIZE), (torch.arange(3 * SIZE) % 3 > 0).float().view(3, SIZE)),
    "given_prefix": (suffix, made(SIZE, 32), torch.randn(3, SIZE), 4),
    "log_probability": (with_log_probability, made(SIZE, 32), 3),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_collapses_and_gives_the_same_sample(name: str) -> None:
    function, *args = CAUSAL[name]
    module, equal = solved(function, *args)
    block = block_of(module)
    assert equal
    assert block.last is not None
    assert block.last.sweeps <= block.loop.trip_count
    assert block.last.prefixes[-1] == block.loop.trip_count


def test_takes_few_sweeps() -> None:
    module, equal = solved(logistic, made(96, 64), 2, 96)
    last = block_of(module).last
    assert equal
    assert last is not None
    assert last.sweeps <= 30


def test_windowed_form_gives_the_same_sample() -> None:
    module, equal = solved(logistic, made(SIZE, 32), 3, SIZE, passes=CollapseSampling(window=4))
    assert block_of(module).window == 4
    assert equal


def leaking_made() -> nn.Module:
    net = made(SIZE, 32)
    net[2].mask[3, 9] = 1  # type: ignore[operator]
    return net


NOT_CAUSAL: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "leaking_mask_entry": (logistic, (leaking_made(), 3, SIZE), "aten.addmm.default"),
    "kernel_centre": (raster, (pixel_cnn(first="centre"), 2, 5), "aten.convolution.default"),
    "look_ahead": (raster, (pixel_cnn(third="ahead"), 2, 5), "aten.convolution.default"),
    "mask_off_by_one": (
        tokens,
        (Attention("mask", diagonal=2), 3),
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
    ),
    "batch_norm_in_training": (
        raster,
        (pixel_cnn(norm=nn.BatchNorm2d(8, track_running_stats=False)).train(), 2, 5),
        "native_batch_norm",
    ),
    "group_norm": (raster, (pixel_cnn(norm=nn.GroupNorm(2, 8)), 2, 5), "aten.native_group_norm.default"),
}


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_refuses_names_the_operation_and_still_samples(name: str) -> None:
    function, args, operation = NOT_CAUSAL[name]
    module, equal = solved(function, *args)
    assert equal
    assert not [child for child in module.children() if isinstance(child, JacobiWrites)]
    reasons = [
        child.reason for child in module.children() if isinstance(child, Loop) and "not collapsed" in child.reason
    ]
    assert len(reasons) == 1
    assert "element [" in reasons[0]
    assert operation in reasons[0]


def test_running_statistics_are_refused_and_named() -> None:
    module = CollapseSampling().run(rolled(raster, pixel_cnn(norm=nn.BatchNorm2d(8)).train(), 2, 5)).module
    reasons = [child.reason for child in module.children() if isinstance(child, Loop) and child.reason]
    assert not [child for child in module.children() if isinstance(child, JacobiWrites)]
    assert any("element [0, 0, 0, 0]" in reason and "batch_norm" in reason for reason in reasons)


def draws_the_ordinary_sample(module: fx.GraphModule, net: nn.Module) -> bool:
    """Whether the compiled :func:`logistic` draws what the loop draws from the same seed."""
    with torch.no_grad():
        torch.manual_seed(3)
        wanted = logistic(net, 3, SIZE)
        torch.manual_seed(3)
        (found,) = module()
    return same(found, wanted)


def test_zeros_of_weights_are_read_where_masks_do_not_suffice() -> None:
    net = nn.Linear(SIZE, 2 * SIZE)
    with torch.no_grad():
        net.weight *= torch.ones(SIZE, SIZE).tril(-1).repeat(2, 1)
    module, equal = solved(logistic, net, 3, SIZE)
    block = block_of(module)
    assert equal
    assert any("weight" in name for name in block.proof.reads)
    # Changing the weight without breaking causality proves anew; breaking it runs the loop in order.
    with torch.no_grad():
        net.weight *= 0.5
    for broken in (False, True):
        if broken:
            with torch.no_grad():
                net.weight[2, 7].fill_(1.0)
        assert draws_the_ordinary_sample(module, net)
        assert block.refused is broken


def test_a_mask_changed_after_the_proof_is_noticed() -> None:
    net = made(SIZE, 32)
    module, equal = solved(logistic, net, 3, SIZE)
    assert equal
    net[2].mask[3, 9] = 1  # type: ignore[operator]
    assert draws_the_ordinary_sample(module, net)
    assert block_of(module).refused


def through_data(mask: torch.Tensor, value: torch.Tensor) -> None:
    mask.data.copy_(value)


def through_numpy(mask: torch.Tensor, value: torch.Tensor) -> None:
    mask.detach().numpy()[...] = value.numpy()


def as_data(mask: torch.Tensor, value: torch.Tensor) -> None:
    mask.data = value.clone()


@pytest.mark.parametrize("change", [through_data, through_numpy, as_data])
@pytest.mark.parametrize("constant", ["mask", "weight"])
def test_a_constant_changed_past_its_version_is_noticed(
    change: Callable[[torch.Tensor, torch.Tensor], None], constant: str
) -> None:
    net: nn.Module = made(SIZE, 32) if constant == "mask" else nn.Linear(SIZE, 2 * SIZE)
    holder: torch.Tensor = net[2].mask if constant == "mask" else net.weight  # type: ignore[index, assignment]
    with torch.no_grad():
        holder *= torch.ones(SIZE, SIZE).tril(-1).repeat(2, 1) if constant == "weight" else 1
    module, equal = solved(logistic, net, 3, SIZE)
    assert equal
    proven = holder.detach().clone()
    for value, refused in [(torch.ones_like(proven), True), (proven, False), (proven * 2, False)]:
        change(holder, value)
        assert draws_the_ordinary_sample(module, net)
        assert block_of(module).refused is refused


def test_a_proof_made_anew_holds_for_the_arguments_that_it_read() -> None:
    mask, weight = torch.ones(SIZE, SIZE).tril(-1), torch.randn(SIZE, SIZE)

    def sample(given: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(3, SIZE)
        for t in range(SIZE):
            x[:, t] = torch.tanh(x @ (weight * mask * given).T)[:, t] + 1
        return x

    strict, whole = torch.ones(SIZE, SIZE).tril(-1), torch.ones(SIZE, SIZE)
    with torch.no_grad():
        module = CollapseSampling().run(rolled(sample, whole)).module
        for given, refused in [(whole, False), (strict, False), (whole, True), (strict, True)]:
            if given is strict:
                mask.fill_(1)  # only the argument makes the network causal now
            assert same(module(given)[0], sample(given))
            assert block_of(module).refused is refused


def test_training_the_weights_does_not_void_the_proof() -> None:
    net = made(SIZE, 32)
    module, _ = solved(logistic, net, 3, SIZE)
    block = block_of(module)
    assert all("mask" in name for name in block.proof.reads)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1)
        torch.manual_seed(3)
        wanted = logistic(net, 3, SIZE)
        torch.manual_seed(3)
        (found,) = module()
    assert same(found, wanted)
    assert not block.refused
