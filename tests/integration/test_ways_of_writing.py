"""Sampling loops that fill their array in other ways than column by column: one scalar a step, through a view."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest
import torch

import fxjacobi
from fxjacobi.loops import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE, SAMPLES = 8, 3
WEIGHT = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)).tril(-1)


def net(x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) @ WEIGHT.T


def check(run: Callable[[torch.Tensor], torch.Tensor]) -> fxjacobi.SolvedModule:
    """Compare a few calls with the ordinary run; nothing may have to be repaired."""
    compiled = fxjacobi.compile(torch.no_grad()(run), measure=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            y = torch.randn(SAMPLES)
            torch.manual_seed(seed)
            found, state = compiled(y), torch.get_rng_state()
            torch.manual_seed(seed)
            with torch.no_grad():
                assert torch.equal(found, run(y))
            assert torch.equal(state, torch.get_rng_state())
    return compiled


def is_collapsed(compiled: fxjacobi.SolvedModule) -> bool:
    return Kind.WRITES in {block.kind for block in compiled.plan.blocks}


def one_array(y: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(SIZE)
    for t in range(SIZE):
        x[t] = torch.tanh(net(x)[t]) + y[0] + torch.randn(())
    return x


def sample_by_sample(y: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(SAMPLES, SIZE)
    for b in range(SAMPLES):
        for t in range(SIZE):
            x[b, t] = torch.tanh(net(x)[b, t]) + y[b] + torch.rand(1)[0]
    return x


def each_sample_by_itself(y: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(SAMPLES, SIZE)
    for b in range(SAMPLES):
        for t in range(SIZE):
            x[b, t] = torch.tanh(net(x[b])[t]) + y[b]
    return x


def sample_within_step(y: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(SAMPLES, SIZE)
    for t in range(SIZE):
        h = torch.tanh(net(x))
        for b in range(SAMPLES):
            x[b, t] = h[b, t] + y[b] + torch.randn(())
    return x


@pytest.mark.parametrize("run", [one_array, sample_by_sample, each_sample_by_itself, sample_within_step])
def test_one_scalar_a_step(run: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert is_collapsed(check(run))


def test_a_scalar_that_depends_on_itself_is_refused() -> None:
    def run(y: torch.Tensor) -> torch.Tensor:
        x = torch.ones(SIZE)
        for t in range(SIZE):
            x[t] = torch.tanh((WEIGHT + torch.eye(SIZE)) @ x)[t] + y[0]
        return x

    compiled = check(run)
    assert not is_collapsed(compiled)
    assert any(
        "of the array, written at step 0, depends on itself through aten.mv" in b.reason for b in compiled.plan.blocks
    )


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": torch.t,
    "split": lambda x: x.view(len(x), 2, SIZE // 2),
    "split and transposed": lambda x: x.view(len(x), 2, SIZE // 2).transpose(0, 1),
    "channels last": lambda x: x.view(len(x), 1, 2, SIZE // 2).permute(0, 2, 3, 1),
    "squeezed": lambda x: x.unsqueeze(1).unsqueeze(0).squeeze(0),
    "flat": lambda x: x.view(-1),
    "part": lambda x: x[:, 1:-1].t()[1:],
    "unbound": lambda x: x.T.unbind()[0].unsqueeze(1),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("name", sorted(VIEWS))
def test_through_a_view(name: str, adds: bool, given: bool) -> None:
    places = VIEWS[name](torch.arange(SAMPLES * SIZE).view(SAMPLES, SIZE))
    columns = [places == t + SIZE * torch.arange(SAMPLES).view(-1, *[1] * places.dim()) for t in range(SIZE)]
    # For each column of the array, where its elements are in the view: all samples at once where they lie in a line.
    order = [[tuple(each.nonzero()[0].tolist()) for each in found if each.any()] for found in columns]

    def run(start: torch.Tensor) -> torch.Tensor:
        x = start if given else torch.zeros(SAMPLES, SIZE)
        seen = VIEWS[name](x)
        for t, places in enumerate(order):
            value = torch.tanh(net(x)[:, t]) + 1
            for sample, place in enumerate(places):
                if adds:
                    seen[place] += value[sample]
                else:
                    seen[place] = value[sample]
        return x

    compiled = fxjacobi.compile(torch.no_grad()(run), measure=False)
    for _ in range(3):
        start, other = (torch.zeros(SAMPLES * SIZE + 1)[1:].view(SAMPLES, SIZE) for _ in range(2))  # not aligned
        other.copy_(start.normal_())
        with torch.no_grad():
            wanted = run(other)
            assert torch.equal(compiled(start), wanted)
            assert not given or torch.equal(start, wanted)
    assert name == "unbound" or is_collapsed(compiled), [b.reason for b in compiled.plan.blocks]


def put_together(y: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(SAMPLES, SIZE)
    for t in range(SIZE):
        x = torch.cat([x[:, :t], torch.tanh(net(x)[:, t : t + 1]) + y[:, None], x[:, t + 1 :]], 1)
    return x


def put_together_of_two(y: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(SAMPLES, SIZE)
    for t in range(SIZE):
        h = torch.tanh(net(x)) + y[:, None]
        x = torch.cat([x[:, :t], h[:, t : t + 1], x[:, t + 1 :]], 1)
    return x


def two_at_a_time(y: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(SAMPLES, SIZE)
    for t in range(0, SIZE, 2):
        x = torch.cat([x[:, :t], torch.tanh(y[:, None] + torch.zeros(2) + x[:, :1]), x[:, t + 2 :]], dim=1)
    return net(x)


def read_in_chunks(y: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(SAMPLES, SIZE)
    for t in range(SIZE):
        x[:, t] = torch.tanh(net(x).chunk(SIZE, 1)[t][:, 0]) + y
    return x


def columns_written_anew(y: torch.Tensor) -> torch.Tensor:
    columns: list[torch.Tensor] = []
    for t in range(SIZE):
        x = torch.zeros(SAMPLES, SIZE)
        if columns:
            x[:, :t] = torch.stack(columns, 1)
        columns.append(torch.tanh(net(x)[:, t]) + y)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("run", [put_together, put_together_of_two, read_in_chunks, columns_written_anew])
def test_put_together_at_each_step(run: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert is_collapsed(check(run))


def test_what_is_put_together_two_at_a_time_is_the_same() -> None:
    check(two_at_a_time)


class Masked(torch.nn.Module):
    """Writes through a mask that it holds."""

    mask: torch.Tensor
    order: torch.Tensor

    def __init__(self, *, indexed: bool) -> None:
        super().__init__()
        self.indexed = indexed
        self.register_buffer("mask", torch.eye(SIZE, dtype=torch.bool))
        self.register_buffer("order", torch.arange(SIZE))

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(SAMPLES, SIZE)
        for t in range(SIZE):
            v = torch.tanh(net(x)) + y[:, None]
            if self.indexed:
                x.index_copy_(1, self.order[t : t + 1], v[:, t : t + 1])
            else:
                x = torch.where(self.mask[t], v, x)
        return x


@pytest.mark.parametrize("indexed", [False, True])
def test_through_a_constant_that_the_model_holds(indexed: bool) -> None:
    model = Masked(indexed=indexed)
    compiled = fxjacobi.compile(model, measure=False)

    def check_again(solved: bool) -> None:
        y = torch.randn(SAMPLES)
        with torch.no_grad():
            assert torch.equal(compiled(y), model(y))
        assert compiled.report.solved is solved

    for first in (True, False, False):
        check_again(not first)
    assert is_collapsed(compiled)
    # Past its version, and in the middle of what is written: the guard compares values.
    model.mask.data[3, 4] = True
    model.order.data[3] = 4
    check_again(False)
    model.mask.data[3, 4] = False
    model.order.data[3] = 3
    check_again(True)


def a_mask_made_in_the_loop(y: torch.Tensor) -> torch.Tensor:
    x = torch.zeros(SAMPLES, SIZE)
    for t in range(SIZE):
        mask = torch.zeros(SIZE, dtype=torch.bool)
        mask[t] = True
        x = torch.where(mask, torch.tanh(net(x)) + y[:, None], x)
    return x


def test_through_a_mask_made_in_the_loop() -> None:
    assert is_collapsed(check(a_mask_made_in_the_loop))


def test_a_place_that_the_run_moves_on_is_no_constant() -> None:
    class Counting(torch.nn.Module):
        place: torch.Tensor
        cache: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("place", torch.zeros(1, dtype=torch.long))
            self.register_buffer("cache", torch.zeros(SAMPLES, 4 * SIZE))

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            for _ in range(SIZE):
                self.cache.index_copy_(1, self.place, torch.tanh(self.cache.sum(1) + y)[:, None])
                self.place += 1
            return self.cache.clone()

    model, twin = Counting(), Counting()
    compiled = fxjacobi.compile(model, measure=False)
    for call in range(3):
        y = torch.randn(SAMPLES)
        with torch.no_grad():
            assert torch.equal(compiled(y), twin(y))
        assert "guard" not in compiled.report.reason, call
