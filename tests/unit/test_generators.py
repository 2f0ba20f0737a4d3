"""The program's own random generators: draws from torch's are part of a graph, draws from others are refused."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import fxjacobi
from fxjacobi.capture import record
from fxjacobi.graph import is_random
from fxjacobi.ops import draw_each
from fxjacobi.trees import split

if TYPE_CHECKING:
    from collections.abc import Callable

_bias = torch.linspace(-1, 1, 8)
_generator = torch.Generator()


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def _once(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    x = x + torch.randn(4, 8, generator=generator)
    for _ in range(300):
        x = torch.tanh(x * 0.3 + _bias)
    return x


def _each_step(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    for _ in range(30):
        noise = torch.randn(4, 8, generator=generator) * torch.rand(8, generator=generator)
        x = torch.tanh(x * 0.3 + noise + torch.randn(8))
    return x


def _tokens(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    out = torch.zeros(4, 12, dtype=torch.int64)
    for t in range(12):
        scores = x + out.sum(1, keepdim=True) + torch.empty(4, 8).uniform_(generator=generator)
        out[:, t] = torch.multinomial(torch.softmax(scores, -1), 1, generator=generator)[:, 0]
    return out


def _of_the_module(x: torch.Tensor) -> torch.Tensor:
    return _each_step(x, _generator)


@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("fn", [_once, _each_step, _tokens, _of_the_module])
def test_a_generator_gives_the_ordinary_runs_numbers(fn: Callable[..., Any], measure: bool) -> None:
    compiled = fxjacobi.compile(fn, measure=measure)
    x = torch.ones(4, 8)
    args = (x,) if fn is _of_the_module else (x, _generator)
    torch.manual_seed(2)
    _generator.manual_seed(1)
    found, left = [compiled(*args) for _ in range(3)], _generator.get_state()
    torch.manual_seed(2)
    _generator.manual_seed(1)
    wanted = [fn(*args) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(left, _generator.get_state())
    if not measure:
        assert compiled.report.solved, compiled.plan


def test_a_call_that_goes_another_way_draws_from_the_generator_once() -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        x = x + torch.rand(4, generator=_generator)
        for _ in range(20):
            x = torch.tanh(x)
        return x + 1 if bool(x.sum() > 0) else x - torch.rand(4, generator=_generator)

    compiled = fxjacobi.compile(branches, measure=False)
    _generator.manual_seed(0)
    compiled(torch.ones(4))
    found, left = compiled(-torch.ones(4) * 3), _generator.get_state()
    assert not compiled.report.solved
    _generator.manual_seed(0)
    branches(torch.ones(4))
    assert torch.equal(found, branches(-torch.ones(4) * 3))
    assert torch.equal(left, _generator.get_state())


def test_one_generator_is_one_attribute_of_the_graph() -> None:
    captured = record(_each_step, (torch.ones(4, 8), _generator), {}).capture
    assert captured is not None
    assert len([n for n in captured.graph_module.graph.nodes if n.op == "get_attr" and "generator" in n.name]) == 1
    assert sum(is_random(n) for n in captured.graph_module.graph.nodes) == 90
    assert [g.device.type for g, _ in captured.generators] == ["cpu"]


@pytest.mark.parametrize("op", [torch.ops.aten.rand.generator, torch.ops.aten.randn.generator])
@pytest.mark.parametrize("inside", [True, False])
def test_grouped_draws_are_the_generators_in_order(op: Any, inside: bool) -> None:
    _generator.manual_seed(0)
    found = draw_each(op, 5, ([3, 7],), {"generator": _generator}, filled=False, inside=inside)
    left = _generator.get_state()
    _generator.manual_seed(0)
    assert all(torch.equal(each, op([3, 7], generator=_generator)) for each in found)
    assert torch.equal(left, _generator.get_state())


def test_a_generator_made_inside_the_run_is_refused() -> None:
    def makes(x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(4, generator=torch.Generator())

    failure = record(makes, (torch.ones(4),), {}).failure
    assert "neither an argument nor reachable" in str(failure)
    assert "test_generators.py:" in str(failure)


def test_the_default_generator_may_be_named() -> None:
    recorded = record(lambda x: x + torch.rand(4, generator=torch.default_generator), (torch.ones(4),), {})
    assert recorded.failure is None


class _Holds(nn.Module):
    def __init__(self, source: Any, draw: Callable[[Any], float]) -> None:
        super().__init__()
        self.sources = [source]
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = self.draw(self.sources[0])
        for _ in range(20):
            x = torch.tanh(x * factor)
        return x


@pytest.mark.parametrize(
    ("source", "draw"),
    [
        (random.Random(0), lambda r: r.random()),
        (random.Random(0).random, lambda r: r()),
        (random.Random(0).gauss, lambda r: r(1, 0.1)),
        (np.random.default_rng(0), lambda r: r.normal()),
        (np.random.Generator(np.random.MT19937(0)), lambda r: r.normal()),
        (np.random.RandomState(0), lambda r: float(r.rand())),
        (np.random.default_rng(0).normal, lambda r: r()),
    ],
    ids=["Random", "its method", "its Python method", "default_rng", "MT19937", "RandomState", "NumPy's method"],
)
def test_draws_from_random_objects_are_refused(source: Any, draw: Callable[[Any], float]) -> None:
    failure = record(_Holds(source, draw), (torch.ones(4),), {}).failure
    assert "the run drew from a " in str(failure)
    assert failure is not None
    assert failure.remedy == "draw with torch"


def test_a_random_object_that_is_only_there_is_no_obstacle() -> None:
    recorded = record(_Holds(random.Random(0), lambda r: 0.5), (torch.ones(4),), {})
    assert recorded.failure is None


def test_objects_that_answer_no_question_are_no_obstacle() -> None:
    class Shy:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

        def __call__(self) -> float:
            return 0.5

    recorded = record(_Holds([Shy()], lambda r: r[0]()), (torch.ones(4),), {})
    assert recorded.failure is None


def test_a_random_object_that_only_the_run_showed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {"rng": np.random.default_rng(0)}
    exec("def step(x):\n    return x.mul(rng.random())", namespace)  # code of another module, reached by its name only
    monkeypatch.setattr(nn, "step_of_a_test", namespace["step"], raising=False)

    def run(x: torch.Tensor) -> Any:
        return nn.step_of_a_test(x)  # type: ignore[attr-defined]

    failure = record(run, (torch.ones(4),), {}).failure
    assert "may have drawn from it" in str(failure)


def test_what_is_drawn_from_random_objects_is_fresh_at_each_call() -> None:
    source = np.random.default_rng(0)
    model = _Holds(source, lambda r: r.normal())
    compiled = fxjacobi.compile(model, measure=False)
    x = torch.ones(4)
    with pytest.warns(fxjacobi.CaptureWarning, match="drew from a numpy"):
        found = [compiled(x) for _ in range(3)]
    model.sources[0] = np.random.default_rng(0)
    assert all(torch.equal(split(a)[1][0], model(x)) for a in found)
