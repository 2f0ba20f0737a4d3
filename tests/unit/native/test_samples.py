"""Samples of a batch on cores of their own: where none reads another's values, and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - as PyTorch's own code has it

from fxjacobi.lanes import cores
from tests.unit.native.natively import assert_rounded, compiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxjacobi.native.program import Run

SIZE = 11
APART: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "elementwise": lambda x, _: torch.tanh(2 * x) + 1,
    "a product": lambda x, w: x @ w,
    "two products": lambda x, w: torch.tanh(x @ w) @ w.t(),
    "heads": lambda x, w: torch.softmax((x @ w).view(SIZE, 2, 3), -1).flatten(1),
    "layer_norm": lambda x, _: F.layer_norm(x, (6,)),
    "joined": lambda x, _: torch.cat([x[:, 3:], x[:, :3]], 1) * x.sum(1, keepdim=True),
    "a row for all": lambda x, w: x + w.sum(0),
    "spread": lambda x, _: x.unsqueeze(1).expand(SIZE, 2, 6).reshape(SIZE, 12)[:, 3:9],
    "products of samples": lambda x, _: torch.bmm(x.view(SIZE, 2, 3), x.view(SIZE, 3, 2)).flatten(1),
}
JOINED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "the mean of a batch": lambda x, _: x - x.mean(0),
    "softmax over the batch": lambda x, _: x.softmax(0),
    "batch norm": lambda x, _: F.batch_norm(x, None, None, training=True),
    "a Gram matrix": lambda x, _: x @ x.t() @ x,
    "turned round": lambda x, _: torch.cat([x[1:], x[:1]]),
    "the first": lambda x, _: x + x[:1],
    "the last, computed": lambda x, _: torch.exp(x) + torch.exp(x)[-1],
    "reshaped": lambda x, _: (2 * x).reshape(6, SIZE).t().reshape(SIZE, 6),
    "halves": lambda x, _: torch.cat([torch.tanh(x).chunk(2)[0], x[SIZE // 2 + 1 :]]),
    "a sum of all": lambda x, _: x * torch.exp(x).sum(),
    "swapped": lambda x, _: (
        x.view(SIZE, 2, 3).transpose(0, 1).reshape(2, -1).repeat(1, 1).view(2, SIZE, 3).transpose(0, 1).reshape(SIZE, 6)
    ),
}


def _runs(function: Callable[..., torch.Tensor]) -> tuple[int, Run, Run, torch.Tensor]:
    """Return by how many samples the program splits, what it comes to alone and on two cores, and PyTorch's value."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(SIZE, 6, generator=generator), torch.randn(6, 6, generator=generator)
    system, program, tensors = compiled(function, x, w, steady=(False, True))
    alone = program(system, tensors)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with cores(2):
            split = program(system, tensors, 2)
    finally:
        torch.set_num_threads(threads)
    return program.samples, alone, split, function(x, w)


@pytest.mark.parametrize("name", APART)
def test_samples_are_split(name: str) -> None:
    samples, alone, split, wanted = _runs(APART[name])
    assert samples == SIZE
    assert_rounded(alone.states[0][0], wanted)
    for one, two in zip(alone.states, split.states, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    assert torch.equal(alone.large, split.large)
    assert bool((split.far > 0).any()) == bool((alone.far > 0).any())


@pytest.mark.parametrize("name", JOINED)
def test_samples_that_read_one_another_are_not(name: str) -> None:
    samples, alone, split, wanted = _runs(JOINED[name])
    assert samples == 1
    assert_rounded(alone.states[0][0], wanted)
    assert torch.equal(alone.states[0], split.states[0])


def test_a_weight_as_large_as_the_batch_is_no_sample() -> None:
    """Its dimension 0 is as long as the batch, and all of it is read by every sample."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(8, 8, generator=generator), torch.randn(8, 8, generator=generator)

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ torch.tanh(w * 2).t() + torch.exp(w).sum(1)

    system, program, tensors = compiled(function, x, w, steady=(False, True))
    assert_rounded(program(system, tensors).states[0][0], function(x, w))
