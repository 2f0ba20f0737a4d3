"""Which specialisation a call gets, and calls that none of them may serve."""

from __future__ import annotations

import pytest
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


def loop(self: Sampler | SamplerModule, x: torch.Tensor) -> torch.Tensor:
    for _ in range(40):
        x = torch.tanh(x @ self.weight)
    return x


class Sampler:
    """Keeps what it compiled of itself."""

    loop = loop

    def __init__(self) -> None:
        self.weight = torch.randn(3, 3)
        self.fast = fxjacobi.compile(self.loop, measure=False)


class SamplerModule(nn.Module):
    """As :class:`Sampler`, with the compiled module among its submodules."""

    loop = loop

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.fast = fxjacobi.compile(self.loop, measure=False)


@pytest.mark.parametrize("kind", [Sampler, SamplerModule])
def test_an_object_may_keep_what_was_compiled_of_it(kind: type[Sampler] | type[SamplerModule]) -> None:
    sampler = kind()
    x = torch.randn(2, 3)
    with torch.no_grad():
        for call in range(3):
            assert torch.equal(sampler.fast(x), sampler.loop(x))
            assert sampler.fast.report.solved == (call > 0)
        # What it reads besides is watched as ever.
        sampler.weight = nn.Parameter(torch.randn(3, 3))
        assert torch.equal(sampler.fast(x), sampler.loop(x))
        assert not sampler.fast.report.solved


def test_what_the_calling_line_reads_is_not_the_models() -> None:
    # All code of this model is torch's, so that its operations are named by the line that calls it.
    names = {"torch": torch, "model": nn.Sequential(*[nn.Tanh()] * 40), "solved": []}
    names["compiled"] = fxjacobi.compile(names["model"], measure=False)  # type: ignore[arg-type]
    script = """
with torch.no_grad():
    for call in range(3):
        x = torch.randn(2, 3) * call
        assert torch.equal(compiled(x), model(x))
        solved.append(compiled.report.solved)
        summary = compiled.plan
"""
    exec(compile(script, "script.py", "exec"), names)
    assert names["solved"] == [False, True, True]
    assert "script.py" in str(names["summary"])


def test_the_plan_names_the_value_that_changes_with_each_call() -> None:
    settings = {"scale": 0.5}

    def scaled(x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            x = torch.tanh(x * settings["scale"])
        return x

    compiled = fxjacobi.compile(scaled, measure=False)
    x = torch.randn(3)
    with torch.no_grad():
        for call in range(12):
            settings["scale"] = 1.0 / (call + 2)
            assert torch.equal(compiled(x), scaled(x))
    assert not compiled.plan.solved
    assert "settings.scale from 0.1" in compiled.plan.reason
