"""The Jacobi solver of sampling loops where values or guesses are not finite, or bits do not keep to the proof."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxjacobi import sampling_solve as module
from fxjacobi.causality import CausalityProof, prove
from fxjacobi.certificate import Certificate
from fxjacobi.sampling import JacobiWrites
from fxjacobi.sampling_array import SamplingArray
from tests.unit.sampling_loops import (
    Sampling,
    call,
    chain,
    guess_overflows,
    made_loop,
    same,
    sampling_loop,
    solve,
    write,
)

aten = torch.ops.aten
inf, nan = float("inf"), float("nan")


@pytest.mark.parametrize("value", [inf, -inf, nan])
@pytest.mark.parametrize("step", [0, 5, 11])
@pytest.mark.parametrize("window", [None, 4])
def test_non_finite_values_of_the_ordinary_run_are_kept(value: float, step: int, window: int | None) -> None:
    # From the step that samples an infinity on, 0 * inf is NaN in the ordinary run too, for everything that follows.
    noise = torch.randn(12, 3)
    noise[step, 1] = value
    sampling = made_loop(noise=noise)
    block, found = solve(sampling, window=window)
    assert same(found, sampling.ordinary())
    assert not torch.isfinite(found[0]).all()
    if step == 5:
        assert block.last is not None
        assert block.last.certificate is Certificate.NOT_FINITE
        assert 0 < block.last.completed <= 7


@pytest.mark.parametrize("value", [inf, nan])
def test_initial_values_that_are_not_finite(value: float) -> None:
    # The ordinary run multiplies what is not written yet by the masks' zeros: everything is NaN.
    sampling = made_loop(start=torch.full((3, 12), value))
    _, found = solve(sampling)
    assert same(found, sampling.ordinary())
    assert found[0].isnan().all()


def test_guesses_that_overflow_do_not_spread() -> None:
    # Squares of squares: guesses of late positions overflow in a few sweeps, long before they are final.
    sampling = chain(3.0)
    block, found = solve(sampling)
    wanted = sampling.ordinary()
    assert same(found, wanted)
    assert not torch.isfinite(wanted[0]).all()  # so does the ordinary run, at its end
    assert block.last is not None


def test_an_infinite_guess_is_reset_and_the_answer_is_finite() -> None:
    sampling = guess_overflows()
    block, found = solve(sampling)
    assert torch.isfinite(found[0]).all()
    assert same(found, sampling.ordinary())
    assert block.last is not None
    assert block.last.completed == 0


def test_without_resetting_an_infinite_guess_would_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = guess_overflows()
    monkeypatch.setattr(SamplingArray, "reset", lambda *_, **__: False)
    monkeypatch.setattr(module, "_any_nan", lambda flags: False)
    monkeypatch.setattr(module.SamplingSolve, "holds", lambda self: True)
    _, found = solve(sampling)
    assert not same(found, sampling.ordinary())


def hidden_overflow() -> Sampling:
    """A finite guess overflows inside the network, and reaches integer tokens through an argmax that swallows the NaN."""
    size = 5
    weight = torch.eye(size)[[0, 0, 1, 2, 3]]
    weight[0] = 0.0

    def body(x: Any, t: Any, n: Any, w: Any) -> Any:
        real = call(aten.mul.Tensor, call(aten._to_copy.default, x), 1.0)
        big = call(aten.exp.default, call(aten.mul.Tensor, real, 60.0))
        mixed = call(aten.mm.default, big, call(aten.t.default, w))
        chosen = call(aten.gt.Tensor, call(aten.select.int, mixed, 1, t), n)
        return write(x, call(aten._to_copy.default, chosen), (None, t))

    noise = torch.full((size, 2), 0.5)
    noise[0] = -1.0
    return sampling_loop(body, torch.zeros(2, size, dtype=torch.long), [range(size)], noise, [weight])


def test_overflow_inside_the_network_is_noticed_behind_a_comparison() -> None:
    sampling = hidden_overflow()
    block, found = solve(sampling)
    assert same(found, sampling.ordinary())
    assert block.last is not None


def poisoned_guess() -> Sampling:
    """The first guess of x2, 2.0, makes ``exp(60 x2)`` infinite, and ``0 * inf`` turns the comparison for x1 over."""
    weight = torch.zeros(3, 3)
    weight[1, 0] = weight[2, 1] = 1.0

    def body(x: Any, t: Any, n: Any, w: Any) -> Any:
        big = call(aten.exp.default, call(aten.mul.Tensor, x, 60.0))
        mixed = call(aten.mm.default, big, call(aten.t.default, w))
        low = call(aten.lt.Scalar, call(aten.select.int, mixed, 1, t), 1e6)
        value = call(aten.mul.Tensor, call(aten._to_copy.default, low), n)
        return write(x, value, (None, t))

    noise = torch.tensor([[0.1], [0.05], [2.0]])
    return sampling_loop(body, torch.zeros(1, 3), [range(3)], noise, [weight])


def test_a_finite_guess_that_overflows_inside_the_network_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = poisoned_guess()
    wanted = sampling.ordinary()
    block, found = solve(sampling)
    assert same(found, wanted)
    assert block.last is not None
    assert block.last.certificate is not Certificate.NOT_FINITE
    # The flag is what notices it: without it, a NaN that a comparison swallows would be taken for an answer.
    monkeypatch.setattr(module, "_any_nan", lambda flags: False)
    monkeypatch.setattr(module.SamplingSolve, "holds", lambda self: True)
    _, blind = solve(sampling)
    assert not same(blind, wanted)


class Smeared(nn.Module):
    """A network whose last bits change with all positions, as a Winograd convolution's may."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> tuple[Any, ...]:
        *sources, flags = self.network(x, *others)
        return (*(source * (1 + 1e-5 * x.sum()) for source in sources), flags)


@pytest.mark.parametrize("window", [None, 4])
def test_a_network_whose_bits_do_not_keep_to_the_proof_is_noticed(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = made_loop(size=24)
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof)
    block = JacobiWrites(proof, window=window)
    monkeypatch.setattr(block, "network", Smeared(block.network))
    for _ in range(2):
        with torch.no_grad():
            found = block(*sampling.operands)
        assert same(found, sampling.ordinary())
        assert block.last is not None
        assert block.last.certificate is Certificate.SEQUENTIAL
    assert "bits change" in block.reason
