"""The cost of a causality proof, counted: calls a node, and nothing that grows with the batch but the array itself."""

from __future__ import annotations

import pytest
import torch

from fxjacobi.bench import Settings
from fxjacobi.bench.analysis_cost import AnalysisCost, CountedCalls, _pixel, loop_around
from fxjacobi.causality import CausalityProof, prove
from tests.unit.sampling_models import pixel_cnn


def test_a_row_holds_what_was_counted() -> None:
    (row,) = AnalysisCost().rows(Settings(rounds=1, quick=True))
    assert row.case == AnalysisCost().cases()[0]
    assert row.values["steps"] == 24
    assert row.values["nodes"] == 13


def counted(batch: int, side: int = 8) -> tuple[CountedCalls, int]:
    net, array = pixel_cnn(16), torch.zeros(batch, 1, side, side)
    places = [[i for i in range(side) for _ in range(side)], [j for _ in range(side) for j in range(side)]]
    loop, known = loop_around(net, array, places, lambda p: (None, None, *p), _pixel)
    with torch.no_grad(), CountedCalls() as count:
        assert isinstance(prove(loop, known), CausalityProof)
    return count, sum(node.op == "call_function" for node in loop.body.graph.nodes)


def test_the_analysis_takes_few_calls_a_node() -> None:
    count, nodes = counted(2)
    # Convolutions take up to ten for each tap of their kernels: 25, 9 and 9 here.
    assert count.calls <= 30 * nodes + 10 * 43


@pytest.mark.parametrize("batch", [8, 64])
def test_the_batch_costs_what_the_array_does(batch: int) -> None:
    one, _ = counted(2)
    many, _ = counted(batch)
    assert many.calls == one.calls
    # Which elements each step writes and reads, and their ranks; no activations, of which there are 100 a pixel.
    assert many.elements - one.elements <= 24 * batch * 64
