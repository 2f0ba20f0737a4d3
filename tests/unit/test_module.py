"""Which specialisation a call gets, and calls that none of them may serve."""

from __future__ import annotations

import torch
from torch import nn

import fxjacobi
from fxjacobi.signature import signature


def repeated(x: torch.Tensor) -> torch.Tensor:
    h = torch.zeros_like(x)
    for _ in range(40):
        h = torch.tanh(h * 0.5 + x)
    return h


def test_inside_a_transform_the_original_runs() -> None:
    x = torch.randn(5, 3)
    compiled = fxjacobi.compile(repeated, measure=False)
    for _ in range(2):  # before a first call, and when there is a specialisation
        assert torch.equal(torch.vmap(compiled)(x), torch.vmap(repeated)(x))
        found = torch.func.grad(lambda x: compiled(x).sum())(x)
        torch.testing.assert_close(found, torch.func.grad(lambda x: repeated(x).sum())(x))
        with torch.no_grad():
            compiled(x)
    assert compiled.report.solved


def test_a_signature_holds_what_products_round_by() -> None:
    x, late = torch.randn(3, 4), torch.randn(13)[1:].view(3, 4)
    assert signature((x,), {})[0] == signature((x.clone(),), {})[0]
    assert signature((x,), {})[0] != signature((late,), {})[0]
    # Sixteen bytes further on, kernels find what they found before.
    assert signature((x,), {})[0] == signature((torch.randn(16)[4:].view(3, 4),), {})[0]
    for other in (x.t(), x.double(), nn.Parameter(x), x.to_sparse()):
        assert signature((x,), {})[0] != signature((other,), {})[0]


def test_arguments_at_other_addresses_are_compiled_by_themselves() -> None:
    compiled = fxjacobi.compile(repeated, measure=False)
    memory = torch.randn(40)
    with torch.no_grad():
        for start in range(8):
            argument = memory[start : start + 6]
            assert torch.equal(compiled(argument), repeated(argument))
    assert "4 signatures" in repr(compiled)
