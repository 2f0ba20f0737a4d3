from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fxjacobi.errors import GuardFailed
from fxjacobi.graph import check, is_random
from fxjacobi.passes.eliminate import Eliminate
from fxjacobi.passes.hoist_random import HoistRandom, blocked_draws, hoist_random
from fxjacobi.passes.roll_loops import RollLoops
from tests.unit.passes.programs import loops, record

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

aten = torch.ops.aten
SEEDS = 40


def draws_first(module: fx.GraphModule) -> bool:
    """Whether no draw comes after a node that computes."""
    seen = False
    for node in module.graph.nodes:
        if is_random(node):
            if seen:
                return False
        elif node.op not in ("placeholder", "get_attr"):
            seen = True
    return True


def assert_same_samples(fn: Callable[..., Any], *args: torch.Tensor, seeds: int = SEEDS) -> fx.GraphModule:
    """Hoist, and compare results and the generator's state afterwards, seed by seed."""
    module = record(fn, *args)
    hoisted = HoistRandom().run(module).module
    check(hoisted, after="hoist_random")
    for seed in range(seeds):
        torch.manual_seed(seed)
        with torch.no_grad():
            wanted = fn(*args)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        with torch.no_grad():
            found = hoisted(*args)
        assert torch.equal(state, torch.get_rng_state())
        for a, b in zip(found, wanted, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a, b)
    return hoisted


SHAPES = {
    "vector": lambda: torch.rand(7),
    "matrix": lambda: torch.rand(3, 5),
    "large": lambda: torch.rand(40, 33),
    "transposed": lambda: torch.rand(33, 40).t(),
    "strided": lambda: torch.rand(6, 20)[:, :7],
    "expanded": lambda: torch.rand(7).expand(6, 7),
    "one": lambda: torch.rand(1),
}
DTYPES = (torch.float32, torch.float64)


def laid_out(name: str, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(1)
    p = SHAPES[name]()
    return torch.as_strided(p.to(dtype).contiguous(), p.shape, p.stride()) if p.is_contiguous() else _like(p, dtype)


def _like(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    storage = torch.rand(1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))).to(dtype)
    return storage.as_strided(p.shape, p.stride())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "draw",
    [
        lambda p: torch.multinomial(p, 1),
        lambda p: torch.multinomial(p, 1, replacement=True),
        torch.bernoulli,
        lambda p: torch.normal(p, p + 1),
        lambda p: torch.normal(p, 2.0),
        lambda p: torch.normal(0.5, p),
        torch.rand_like,
        torch.randn_like,
        lambda p: torch.randint_like(p, 9),
        lambda p: torch.randint_like(p, 3, 9),
        lambda p: torch.bernoulli(p, 0.3),
        lambda p: torch.empty_like(p).exponential_(2.0),
        lambda p: torch.empty_like(p).uniform_(-1, 2),
        lambda p: torch.empty_like(p).normal_(1, 3),
        lambda p: torch.empty_like(p).geometric_(0.3),
        lambda p: torch.empty_like(p).log_normal_(0.3),
        lambda p: torch.empty_like(p).cauchy_(0.3),
        lambda p: torch.empty_like(p).random_(7),
        lambda p: torch.nn.functional.dropout(p, 0.3),
        lambda p: aten.native_dropout(p, 0.3, True)[0],
    ],
)
def test_each_draw_equals_its_rewriting(draw: Any, name: str, dtype: torch.dtype) -> None:
    p = laid_out(name, dtype)

    def fn(p: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = draw(p * 0.5 + 0.25 if name in ("vector", "matrix", "one") else p)
        return result

    assert draws_first(assert_same_samples(fn, p, seeds=12))


@pytest.mark.parametrize("dtype", DTYPES)
def test_categorical_sampling_over_many_seeds(dtype: torch.dtype) -> None:
    p = torch.rand(50, 11, dtype=dtype)
    p[:, 3] = 0
    p[5, :7] = 0
    hoisted = assert_same_samples(lambda p: torch.multinomial(torch.softmax(p.log(), -1), 1), p, seeds=200)
    assert draws_first(hoisted)


def test_distributions_in_a_loop_roll_once_the_draws_are_first() -> None:
    def sample(x: torch.Tensor) -> torch.Tensor:
        out = []
        for _ in range(8):
            p = torch.softmax(x, -1)
            k = torch.distributions.Categorical(p).sample()
            x = torch.sin(x) + k.unsqueeze(-1)
            x = x + torch.distributions.Normal(x, 1.0).sample() * torch.bernoulli(p)
            out.append(k)
        return torch.stack(out)

    hoisted = assert_same_samples(sample, torch.randn(4, 5))
    assert draws_first(hoisted)
    rolled = RollLoops().run(Eliminate().run(hoisted).module).module
    assert max(loop.trip_count for loop in loops(rolled)) >= 7
    torch.manual_seed(5)
    wanted = sample(torch.ones(4, 5))
    torch.manual_seed(5)
    with torch.no_grad():
        assert torch.equal(rolled(torch.ones(4, 5))[0], wanted)


def test_a_draw_that_cannot_move_holds_back_those_after_it() -> None:
    def mixed(x: torch.Tensor) -> torch.Tensor:
        a = torch.sin(x) + torch.randn(3)
        b = torch.poisson(a.abs())
        return torch.tanh(b) + torch.randn(3)

    hoisted = assert_same_samples(mixed, torch.randn(3))
    names = [node.target for node in hoisted.graph.nodes if node.op == "call_function"]
    assert names[0] is aten.randn.default
    assert names.index(aten.poisson.default) < len(names) - 1 - names[::-1].index(aten.randn.default)
    blocked = blocked_draws(hoisted)
    assert [entry.reason for entry in blocked] == [
        "its values depend on the run's",
        f"{blocked[0].node} draws before it",
    ]
    assert blocked[0].site is not None
    assert not HoistRandom().run(hoisted).modified


@pytest.mark.parametrize(
    "draw",
    [lambda p: torch.multinomial(p, 3), lambda p: torch.bernoulli(p.to(torch.bfloat16)), torch.poisson],
)
def test_what_has_no_equal_stays(draw: Any) -> None:
    module = record(lambda p: draw(torch.sigmoid(p)), torch.rand(4, 5))
    assert len(blocked_draws(module)) == 1
    assert hoist_random(module) is module


def test_draws_at_the_front_already_stay() -> None:
    module = record(lambda x: torch.tanh(torch.randn(3) * torch.rand(3) + x), torch.randn(3))
    assert not HoistRandom().run(HoistRandom().run(module).module).modified


@pytest.mark.parametrize("bad", [float("nan"), -0.5, float("inf")])
@pytest.mark.parametrize("draw", [lambda p: torch.multinomial(p, 1), torch.bernoulli])
def test_arguments_that_the_original_refuses_fail_a_guard(draw: Any, bad: float) -> None:
    hoisted = HoistRandom().run(record(lambda p: draw(p * 0.5), torch.rand(4, 5))).module
    p = torch.rand(4, 5)
    p[2, 3] = bad
    with pytest.raises(RuntimeError):
        draw(p * 0.5)
    with pytest.raises(GuardFailed):
        hoisted(p)


def test_a_row_without_weight_and_a_negative_deviation_fail_a_guard() -> None:
    categorical = HoistRandom().run(record(lambda p: torch.multinomial(p * 2, 1), torch.rand(4, 5))).module
    with pytest.raises(GuardFailed):
        categorical(torch.cat([torch.rand(3, 5), torch.zeros(1, 5)]))
    normal = HoistRandom().run(record(lambda p: torch.normal(p, p * 2), torch.rand(4))).module
    with pytest.raises(GuardFailed):
        normal(torch.tensor([1.0, -1.0, 1.0, 1.0]))


DRAWS: list[Any] = [
    lambda x: torch.randn(5) + x,
    lambda x: torch.rand(2, 5).sum(0) * x,
    lambda x: torch.bernoulli(torch.sigmoid(x)),
    lambda x: torch.multinomial(torch.softmax(x, 0), 1) + x,
    lambda x: torch.nn.functional.dropout(x, 0.2),
    lambda x: torch.poisson(x.abs()),
    lambda x: torch.normal(x, x.abs()),
    lambda x: x[torch.randperm(5)],
    lambda x: torch.randint(0, 5, (5,)) + x,
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(range(len(DRAWS))), min_size=1, max_size=8))
def test_any_sequence_of_draws_gives_the_same_sample(sequence: list[int]) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        for number in sequence:
            x = torch.tanh(DRAWS[number](x))
        return x

    hoisted = assert_same_samples(program, torch.linspace(-1, 1, 5), seeds=4)
    assert draws_first(hoisted) or 5 in sequence
