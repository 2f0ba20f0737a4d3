"""The CPU double behaves as CUDA graphs do: fixed memory, Python values of the capture, and no host in between."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from fxjacobi.constants import constant
from fxjacobi.device import Refused
from fxjacobi.testing.graph_double import GraphDouble, host_reads

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")


def test_a_replay_reads_and_writes_the_memory_of_the_capture() -> None:
    x, total, factor = torch.ones(3), torch.zeros(3), 2.0

    def program() -> list[torch.Tensor]:
        doubled = x * factor
        total.add_(doubled.view(3))
        return [doubled]

    double = GraphDouble(warm_ups=1)
    captured = double.capture(program, CPU)
    assert not isinstance(captured, Refused)
    (out,) = captured.outputs
    address = out.data_ptr()
    factor = 100.0  # a graph holds the number of its capture
    x.fill_(5.0)
    total.zero_()
    captured.replay()
    assert out.data_ptr() == address
    assert out.tolist() == [10.0] * 3
    assert total.tolist() == [10.0] * 3
    assert double.launches == 2


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (lambda x: x.sum().item(), "reads a value back"),
        (lambda x: bool(x.sum()), "reads a value back"),
        (lambda x: torch.equal(x, x), "reads a value back"),
        (lambda x: x.nonzero(), "depends on data"),
        (lambda x: x[x > 0], "depends on data"),
        (lambda x: x.masked_select(x > 0), "depends on data"),
        (lambda x: x.index_put((x > 0,), x), "depends on data"),
        (lambda x: x + torch.rand(3), "draws random numbers"),
        (lambda x: x.bernoulli(0.5), "draws random numbers"),
        (lambda x: x[torch.tensor([0, 1])], "Python values"),
        (lambda x: x.to("meta"), "another device"),
        (lambda x: torch.linalg.eigh(x.outer(x)), "checks for errors on the host"),
    ],
)
def test_what_needs_the_host_is_refused(operation: Callable[[torch.Tensor], object], reason: str) -> None:
    x = torch.ones(3)

    def program() -> list[torch.Tensor]:
        operation(x)
        return [x + 1]

    double = GraphDouble()
    refused = double.capture(program, CPU)
    assert isinstance(refused, Refused)
    assert reason in refused.reason
    assert double.refusals == [refused.reason]
    with host_reads() as reads:
        program()
    assert reads


def test_dropout_that_drops_nothing_is_no_draw() -> None:
    q = torch.randn(1, 2, 4, 8)
    captured = GraphDouble().capture(lambda: [torch.nn.functional.scaled_dot_product_attention(q, q, q)], CPU)
    assert not isinstance(captured, Refused)


def test_constants_are_made_once_and_live_as_long_as_the_capture() -> None:
    x = torch.arange(4.0)
    captured = GraphDouble().capture(lambda: [x.index_select(0, constant([2, 0], device=CPU))], CPU)
    assert not isinstance(captured, Refused)
    x.mul_(10)
    captured.replay()
    assert captured.outputs[0].tolist() == [20.0, 0.0]
    assert constant([1], device=CPU) is not constant([1], device=CPU)
