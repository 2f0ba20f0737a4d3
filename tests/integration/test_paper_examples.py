"""The paper's experiments that are no sampling: the networks are its own, and training is the ordinary one's."""

from __future__ import annotations

import pytest
import torch

import fxjacobi
from fxjacobi.bench.example_models import example
from fxjacobi.testing import assert_equal_bits

backpropagation, densenet = example("paper_backpropagation"), example("paper_densenet")


def test_densenet_201_has_its_98_layers_and_20_million_parameters() -> None:
    with torch.device("meta"):
        model = densenet.DenseNet()
    assert sum(len(block) for block in model.blocks) == 98
    assert sum(parameter.numel() for parameter in model.parameters()) == 20_013_928


def test_densenet_runs_as_it_is() -> None:
    model = densenet.network((2, 3), 4)
    compiled = fxjacobi.compile(model)
    with torch.no_grad():
        for seed in range(2):
            image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
            assert_equal_bits(compiled(image), model(image))
    assert compiled.plan.reason


@pytest.mark.parametrize("method", ["chunked", "jacobi"])
def test_training_by_solved_states_and_adjoints_is_the_ordinary_training(method: str) -> None:
    ordinary, solved = backpropagation.network(), backpropagation.network()
    xs = backpropagation.pixels()[:4, :60]
    compiled = fxjacobi.compile(solved, rtol=1e-6, method=method, measure=False)
    backpropagation.gradients(solved, compiled, xs[:1])
    found = backpropagation.gradients(solved, compiled, xs[1:2])
    wanted = backpropagation.gradients(ordinary, ordinary, xs[1:2])
    assert compiled.report.solved, compiled.report.reason
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max()) <= 1e-4 * float(b.abs().max())
    losses, _ = backpropagation.train(solved, compiled, xs, updates=4)
    expected, _ = backpropagation.train(ordinary, ordinary, xs, updates=4)
    assert losses == pytest.approx(expected, rel=1e-4)
