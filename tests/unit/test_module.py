"""Which specialisation a call gets, and calls that none of them may serve."""

from __future__ import annotations

import copy
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxjacobi
from fxjacobi.errors import CaptureWarning
from fxjacobi.signature import signature

if TYPE_CHECKING:
    from pathlib import Path


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


def test_values_of_arguments_are_compared_where_they_cannot_change() -> None:
    def scaled(x: torch.Tensor, scale: Any, window: Any) -> torch.Tensor:
        for _ in range(40):
            x = torch.tanh(x * float(scale))
        return x[window] if isinstance(window, slice) else x

    compiled, x = fxjacobi.compile(scaled, measure=False), torch.randn(4)
    calls = [(np.float32(0.5), slice(0, 3)), (Fraction(1, 3), frozenset({1})), (np.int64(1), slice(1, None))]
    with torch.no_grad():
        for scale, window in calls:
            for call in range(2):
                again: Any = copy.deepcopy((scale, window))
                assert torch.equal(compiled(x, *again), scaled(x, scale, window))
                assert compiled.report.solved == (call > 0)


def test_arguments_whose_values_differ_at_every_call_run_the_original() -> None:
    def scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(x * scale)
        return x

    compiled, x = fxjacobi.compile(scaled, measure=False), torch.randn(4)
    with torch.no_grad():
        for call in range(40):
            assert torch.equal(compiled(x, 0.1 + call), scaled(x, 0.1 + call))
        assert "as a tensor" in compiled.report.reason
        compiled(x, 0.1)  # one that is compiled is solved still
        assert compiled.report.solved


def test_autocast_to_another_type_is_another_call() -> None:
    weight, x = torch.randn(8, 8), torch.randn(4, 8)

    def products(x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            x = torch.tanh(x @ weight)
        return x

    compiled = fxjacobi.compile(products, measure=False)
    for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.float16):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            assert torch.equal(compiled(x), products(x))


def test_in_another_mode_a_model_that_ran_as_it_is_is_looked_at_again() -> None:
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.steps = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.steps):
                x = torch.tanh(self.norm(x) if self.training else x * 0.5)
            return x

    model, x = Norms(), torch.randn(4, 3)
    compiled = fxjacobi.compile(model, measure=False)
    compiled(x), compiled(x)
    model.steps = 40
    with torch.no_grad():
        for _ in range(2 * 16):
            model.eval()
            assert torch.equal(compiled(x), model(x))
        assert compiled.report.solved


def test_copies_compile_anew(tmp_path: Path) -> None:
    model = SamplerModule()
    x = torch.randn(2, 3)
    with torch.no_grad():
        model.fast(x), model.fast(x)
        for other in (copy.deepcopy(model), copy.deepcopy(model.fast)):
            fast = other.fast if isinstance(other, SamplerModule) else other
            assert not fast.report.solved
            fast(x)
            assert torch.equal(fast(x), model.fast(x))
            assert fast.report.solved
        torch.save(fxjacobi.compile(nn.Linear(3, 3)), tmp_path / "model.pt")
        assert isinstance(torch.load(tmp_path / "model.pt", weights_only=False), fxjacobi.SolvedModule)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_under_checkpointing_and_tracing_the_original_runs() -> None:
    linear = nn.Linear(3, 3)

    def layers(x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            x = torch.tanh(linear(x))
        return x

    compiled, x = fxjacobi.compile(layers, measure=False), torch.randn(2, 3, requires_grad=True)
    for _ in range(3):
        found = torch.autograd.grad(checkpoint(compiled, x, use_reentrant=False).sum(), x)[0]
        assert torch.equal(found, torch.autograd.grad(layers(x).sum(), x)[0])
        assert "checkpoint" in compiled.report.reason
        compiled(x)
    linear.requires_grad_(False)  # tracing a function bakes its weights in
    traced = torch.jit.trace(compiled, x.detach())
    assert torch.equal(traced(x.detach()), layers(x.detach()))


def test_a_compiled_module_inside_another_is_recorded_as_its_original() -> None:
    inner = fxjacobi.compile(repeated, measure=False)
    x = torch.randn(3)

    def outer(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = inner(x) * 0.9
        return x

    with torch.no_grad():
        inner(x), inner(x)
        compiled = fxjacobi.compile(outer, measure=False)
        for _ in range(3):
            x = torch.randn(3)
            assert torch.equal(compiled(x), outer(x))
        assert compiled.report.solved


class Decorated:
    @fxjacobi.compile
    def run(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            x = torch.tanh(x * 0.5)
        return x


def test_a_method_that_is_compiled_in_its_class() -> None:
    model, x = Decorated(), torch.randn(3)
    assert torch.equal(model.run(x), model.run(x))


def test_attributes_of_the_original_are_set_there() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.steps):
                x = torch.tanh(x)
            return x

    model = Steps()
    compiled = fxjacobi.compile(model)
    compiled.steps = 5
    assert model.steps == 5
    compiled.other = 1
    assert not hasattr(model, "other")


@dataclass
class WithNorm:
    h: torch.Tensor

    def __post_init__(self) -> None:
        self.norm = self.h.norm()


def test_results_that_fields_do_not_make_again_are_refused() -> None:
    def wrapped(x: torch.Tensor) -> WithNorm:
        return WithNorm(repeated(x))

    def listed(x: torch.Tensor) -> defaultdict[str, list[torch.Tensor]]:
        return defaultdict(list, h=[repeated(x)])

    x = torch.randn(3)
    compiled, others = fxjacobi.compile(wrapped, measure=False), fxjacobi.compile(listed, measure=False)
    with torch.no_grad():
        with pytest.warns(CaptureWarning, match="WithNorm"):
            compiled(x)
        for _ in range(3):
            assert torch.equal(compiled(x).norm, wrapped(x).norm)
            assert others(x).default_factory is list
    assert others.report.solved


def test_threads_that_come_at_once_compile_once() -> None:
    compiled, x = fxjacobi.compile(repeated, measure=False), torch.randn(3)

    def call(_: int) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = compiled(x)
        return found

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(call, range(16)):
            assert torch.equal(found, repeated(x))
    assert [len(known) for known in compiled._specialisations.values()] == [1]
