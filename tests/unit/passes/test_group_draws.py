"""Equal draws by one call: the same numbers from the same seed, in the same order, and the generator left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from fxjacobi.capture import capture
from fxjacobi.ops import draw_each
from fxjacobi.passes.group_draws import GroupDraws
from fxjacobi.passes.hoist_random import HoistRandom
from fxjacobi.placement import phase_of
from fxjacobi.verify import equal

STEPS = 6


def calls(module: fx.GraphModule) -> list[int]:
    return [int(n.args[1]) for n in module.graph.nodes if n.target is draw_each]


def rands(x: torch.Tensor) -> torch.Tensor:
    return x + sum(torch.rand(7) * t for t in range(STEPS))


def normals(x: torch.Tensor) -> torch.Tensor:
    return x + torch.stack([torch.randn(17, dtype=torch.float64) for _ in range(STEPS)]).sum()


def integers(x: torch.Tensor) -> torch.Tensor:
    return x + torch.cat([torch.randint(3, 9, (5,)) for _ in range(STEPS)]).sum()


def exponentials(x: torch.Tensor) -> torch.Tensor:
    return x + sum(torch.empty(3, 7).t().exponential_(2.0).sum() for _ in range(STEPS))


def races(x: torch.Tensor) -> torch.Tensor:
    return sum((torch.multinomial(x.softmax(-1), 1) for _ in range(STEPS)), torch.zeros(()))


def in_turn(x: torch.Tensor) -> torch.Tensor:
    return x + sum(torch.rand(7) * torch.randn(7) for _ in range(STEPS))


def two_runs(x: torch.Tensor) -> torch.Tensor:
    return x + sum(torch.rand(7) for _ in range(STEPS)) * sum(torch.randn(7) for _ in range(STEPS))


@pytest.mark.parametrize(("function", "runs"), [
    (rands, [STEPS]), (normals, [STEPS]), (integers, [STEPS]), (exponentials, [STEPS]), (races, [STEPS]),
    (in_turn, []), (two_runs, [STEPS, STEPS]),
])  # fmt: skip
def test_the_same_numbers_in_the_same_order(function: Any, runs: list[int]) -> None:
    x = torch.randn(7)
    module = HoistRandom().run(capture(function, (x,), {}).graph_module).module
    grouped = GroupDraws().run(module)
    assert calls(grouped.module) == runs
    assert grouped.modified is bool(runs)
    for seed in range(3):
        torch.manual_seed(seed)
        wanted, state = function(x), torch.get_rng_state()
        torch.manual_seed(seed)
        assert equal(grouped.module(x)[0], wanted)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_draw_between_two_keeps_them_apart() -> None:
    graph = fx.Graph()
    rand, randn = torch.ops.aten.rand.default, torch.ops.aten.randn.default
    drawn = [graph.call_function(op, ([3],)) for op in (rand, rand, randn, rand)]
    for node in drawn:
        node.meta["spec"] = None
    graph.output(tuple(drawn))
    module = fx.GraphModule({}, graph)
    grouped = GroupDraws().apply(module).module
    assert calls(grouped) == [2]
    torch.manual_seed(0)
    wanted = module()
    torch.manual_seed(0)
    assert all(equal(a, b) for a, b in zip(grouped(), wanted, strict=True))


def test_it_is_done_once() -> None:
    module = HoistRandom().run(capture(rands, (torch.randn(7),), {}).graph_module).module
    once = GroupDraws().run(module).module
    assert GroupDraws().run(once).module is once


@given(
    count=st.integers(2, 9),
    shape=st.lists(st.integers(1, 5), max_size=3),
    dtype=st.sampled_from([None, torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_draws_that_stay_inside_are_those_of_single_calls(
    count: int, shape: list[int], dtype: torch.dtype | None, seed: int
) -> None:
    kwargs = {"dtype": dtype, "device": torch.device("cpu"), "pin_memory": False}
    torch.manual_seed(seed)
    wanted, state = [torch.ops.aten.rand.default(shape, **kwargs) for _ in range(count)], torch.get_rng_state()
    torch.manual_seed(seed)
    found = draw_each(torch.ops.aten.rand.default, count, (shape,), kwargs, filled=False, inside=True)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(found, wanted, strict=True):
        assert equal(one, other)
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert phase_of(one) == phase_of(other) == 0
    together = len({one.untyped_storage().data_ptr() for one in found}) == 1
    assert together is (dtype not in (torch.float16, torch.bfloat16))


def test_draws_that_leave_have_memory_of_their_own() -> None:
    module = HoistRandom().run(capture(rands, (torch.randn(7),), {}).graph_module).module
    (call,) = (n for n in GroupDraws().run(module).module.graph.nodes if n.target is draw_each)
    assert call.kwargs == {"filled": False, "inside": False}
    found = draw_each(*call.args, **call.kwargs)
    assert len({one.untyped_storage().data_ptr() for one in found}) == len(found)
