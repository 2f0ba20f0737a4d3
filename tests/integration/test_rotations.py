"""Where iterations begin: a loop carries what its recurrence needs, however the program is written."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import fxjacobi
from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.loops import Carried, Loop
from fxjacobi.testing.assertions import assert_equal_bits

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 12
LEVELS = torch.linspace(0.02, 0.98, STEPS + 1)


class Denoiser(nn.Module):
    """Noise in ``x`` of shape (B, 6) at times (B, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.time, self.last = nn.Linear(6, 10), nn.Linear(1, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        estimate: Tensor = self.last(nn.functional.silu(self.first(x) + self.time(t)))
        return estimate


def times(x: Tensor, t: int) -> Tensor:
    return torch.full((x.shape[0], 1), t / STEPS)


def levels_of_tensors(net: Denoiser, x: Tensor) -> Tensor:
    """Neighbouring steps share a level, and so what is computed of it."""
    for t in range(STEPS):
        now, after = LEVELS[t], LEVELS[t + 1]
        noise = net(x, times(x, t))
        clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
        x = after.sqrt() * clean + (1 - after).sqrt() * noise
    return x


def levels_of_numbers(net: Denoiser, x: Tensor) -> Tensor:
    levels = LEVELS.tolist()
    for t, (now, after) in enumerate(pairwise(levels)):
        noise = net(x, times(x, t))
        clean = (x - (1 - now) ** 0.5 * noise) / now**0.5
        x = after**0.5 * clean + (1 - after) ** 0.5 * noise
    return x


def coefficients_first(net: Denoiser, x: Tensor) -> Tensor:
    shrink = (LEVELS[1:] / LEVELS[:-1]).sqrt()
    follow = (1 - LEVELS[1:]).sqrt() - shrink * (1 - LEVELS[:-1]).sqrt()
    for t in range(STEPS):
        x = shrink[t] * x + follow[t] * net(x, times(x, t))
    return x


def everything_kept(net: Denoiser, x: Tensor) -> tuple[Tensor, Tensor]:
    images, clean = [x], list[Tensor]()
    for t in range(STEPS):
        noise = net(images[-1], times(x, t))
        now, after = LEVELS[t], LEVELS[t + 1]
        clean.append((images[-1] - (1 - now).sqrt() * noise) / now.sqrt())
        images.append(after.sqrt() * clean[-1] + (1 - after).sqrt() * noise)
    return torch.stack(images), torch.stack(clean)


def clean_at_the_last(net: Denoiser, x: Tensor) -> Tensor:
    clean = x
    for t in range(STEPS):
        noise = net(x, times(x, t))
        now = LEVELS[t]
        clean = torch.clamp((x - (1 - now).sqrt() * noise) / now.sqrt(), -1, 1)
        if t == STEPS - 1:
            break
        after = LEVELS[t + 1]
        x = after.sqrt() * clean + (1 - after).sqrt() * (x - now.sqrt() * clean) / (1 - now).sqrt()
    return clean


def guided(net: Denoiser, x: Tensor) -> Tensor:
    for t in range(STEPS):
        both, less = net(torch.cat([x, 0.5 * x]), times(torch.cat([x, x]), t)).chunk(2)
        noise = less + 1.5 * (both - less)
        now, after = LEVELS[t], LEVELS[t + 1]
        x = after.sqrt() * (x - (1 - now).sqrt() * noise) / now.sqrt() + (1 - after).sqrt() * noise
    return x


class Scheduler:
    """The way of libraries: a step looks the levels of its time and the time before up."""

    def __init__(self, levels: Tensor) -> None:
        self.levels, self.final = levels.flip(0), torch.tensor(1.0)

    def step(self, noise: Tensor, t: int, x: Tensor) -> Tensor:
        level = self.levels[t]
        before = self.levels[t - 1] if t > 0 else self.final
        clean = (x - (1 - level) ** 0.5 * noise) / level**0.5
        direction = (1 - before) ** 0.5 * noise
        return before**0.5 * clean + direction


def scheduled(net: Denoiser, x: Tensor) -> Tensor:
    scheduler = Scheduler(LEVELS)
    for t in reversed(range(STEPS)):
        x = scheduler.step(net(x, times(x, t)), t, x)
    return x


def recurrences(compiled: Any) -> list[Loop]:
    """The loops that carry something, as they are split."""
    modules = compiled.stages["split_components"].children()
    return [m for m in modules if isinstance(m, Loop) and any(isinstance(b, Carried) for b in m.bindings)]


def carried(loop: Loop) -> list[tuple[int, ...]]:
    """The shapes that a loop carries from one step to the next."""
    placeholders = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
    specs = [spec_of(p) for p, b in zip(placeholders, loop.bindings, strict=True) if isinstance(b, Carried)]
    assert all(isinstance(spec, TensorSpec) for spec in specs)
    return [spec.shape for spec in specs if isinstance(spec, TensorSpec)]


@torch.no_grad()
def compiled_twice(run: Callable[..., Any], first: tuple[Any, ...], second: tuple[Any, ...]) -> Any:
    compiled = fxjacobi.compile(run, measure=False)
    for arguments in (first, second):
        assert_equal_bits(compiled(*arguments), run(*arguments))
    return compiled


@pytest.mark.parametrize(
    "sample",
    [
        levels_of_tensors, levels_of_numbers, coefficients_first, everything_kept, clean_at_the_last, guided, scheduled,
    ],
)  # fmt: skip
def test_a_sampler_carries_its_image_alone(sample: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    net = Denoiser()
    compiled = compiled_twice(sample, (net, torch.randn(2, 6)), (net, torch.randn(2, 6)))
    (loop,) = recurrences(compiled)
    assert carried(loop) == [(2, 6)]
    assert loop.trip_count >= STEPS - 2


@pytest.mark.parametrize(("cell", "states"), [(nn.GRUCell, 1), (nn.LSTMCell, 2), (nn.RNNCell, 1)])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_cell_carries_its_state(cell: type[nn.Module], states: int, *, stacked: bool) -> None:
    torch.manual_seed(0)
    step = cell(3, 5)

    def run(x: Tensor) -> tuple[Tensor, Any]:
        h: Any = torch.zeros(2, 5) if states == 1 else (torch.zeros(2, 5), torch.zeros(2, 5))
        out = []
        for t in range(STEPS):
            h = step(x[:, t], h)
            out.append(h if states == 1 else h[0])
        return torch.stack(out, 1) if stacked else out[-1], h

    compiled = compiled_twice(run, (torch.randn(2, STEPS, 3),), (torch.randn(2, STEPS, 3),))
    (loop,) = recurrences(compiled)
    assert carried(loop) == [(2, 5)] * states
    assert loop.trip_count == STEPS


def test_an_iteration_is_given_up_for_a_smaller_state() -> None:
    """What a step hands on in three tensors is made from one; where that one is carried, a step is left at either end."""
    torch.manual_seed(0)
    weight = torch.randn(8, 8) / 4

    def run(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        for _ in range(STEPS):
            z = torch.tanh((a + b * c) @ weight)
            a, b, c = z.sin(), z.cos() * 0.5, z.exp()
        return a + b + c

    compiled = compiled_twice(run, *((tuple(torch.randn(2, 8) for _ in range(3))) for _ in range(2)))
    (loop,) = recurrences(compiled)
    assert carried(loop) == [(2, 8)]
    assert loop.trip_count == STEPS - 1
