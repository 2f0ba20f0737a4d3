"""What a compiled module promises besides equal values: guards, state, errors, signatures, deoptimisation."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fxjacobi
from fxjacobi import compiler
from fxjacobi.batched import BatchedMap
from fxjacobi.specialisation import MAX_GUARD_FAILURES
from fxjacobi.verify import equal


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def _halve(x: torch.Tensor) -> torch.Tensor:
    while x.abs().max() > 1:
        x = x / 2
    return x


def test_another_path_runs_the_original() -> None:
    compiled = fxjacobi.compile(_halve, measure=False)
    compiled(torch.tensor([20.0]))
    for value in (20.0, 3.0, 1000.0, 0.5, float("nan"), 17.0):
        x = torch.tensor([value])
        assert equal(compiled(x), _halve(x))
    reports = []
    for value in (19.0, 1e6):
        compiled(torch.tensor([value]))
        reports.append(compiled.report)
    assert reports[0].solved
    assert not reports[1].solved
    assert "other way" in reports[1].reason


def test_the_users_exception_comes_out_and_the_module_stays_usable() -> None:
    def checked(x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            x = torch.floor(x / 2)
        if not (x >= 0).all():
            raise ValueError("negative values")
        return x

    compiled = fxjacobi.compile(checked, measure=False)
    good, bad = torch.tensor([40.0, 3.0]), torch.tensor([-40.0, 3.0])
    assert equal(compiled(good), checked(good))
    with pytest.raises(ValueError, match="negative values"):
        compiled(bad)
    assert equal(compiled(good), checked(good))
    assert compiled.report.solved


def test_nothing_is_visible_before_the_guards_hold() -> None:
    class Model(nn.Module):
        count: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count += 1
            x.mul_(2)
            noise = torch.rand(x.shape)
            for _ in range(4):
                x = x * 0.5
            return x + noise if x.sum() > 0 else x - 2 * noise

    plain = Model()
    twin = copy.deepcopy(plain)
    compiled = fxjacobi.compile(twin, measure=False)
    for call, sign in enumerate((1.0, 1.0, -1.0, 1.0, -1.0)):
        a = torch.full((3,), sign)
        b = a.clone()
        torch.manual_seed(call)
        wanted = plain(a)
        state = torch.get_rng_state()
        torch.manual_seed(call)
        found = compiled(b)
        assert equal(found, wanted)
        assert equal(a, b)
        assert equal(twin.count, plain.count)
        assert torch.equal(torch.get_rng_state(), state)


def test_guards_that_keep_failing_go_back_to_the_original_for_good() -> None:
    def follow(x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = x * 0.5
        return x * x.sum().item()

    compiled = fxjacobi.compile(follow, measure=False)
    for _ in range(MAX_GUARD_FAILURES + 2):
        x = torch.rand(3)
        assert equal(compiled(x), follow(x))
    assert not compiled.plan.solved
    assert "guards failed" in compiled.plan.reason


def test_a_changed_attribute_is_a_new_specialisation() -> None:
    class Repeat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps, self.scale = 8, 0.5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(self.steps):
                x = torch.floor(x * self.scale)
            return x

    model = Repeat()
    compiled = fxjacobi.compile(model, measure=False)
    x = torch.arange(5.0) * 100
    for steps, scale in ((8, 0.5), (3, 0.5), (3, 0.75), (8, 0.5)):
        model.steps, model.scale = steps, scale
        assert equal(compiled(x), model(x))
        assert compiled.report.solved or not compiled.report.blocks


SCALE = 2.0


def test_a_changed_global_is_a_new_specialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.floor(x / SCALE)
        return x

    compiled = fxjacobi.compile(scaled, measure=False)
    x = torch.arange(8.0) * 9
    assert equal(compiled(x), scaled(x))
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert equal(compiled(x), scaled(x))


def test_parameters_are_live_and_rebinding_them_is_seen() -> None:
    linear = nn.Linear(4, 4)

    def repeat(x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = torch.round(linear(x))
        return x

    compiled = fxjacobi.compile(repeat, measure=False)
    x = torch.randn(3, 4)
    assert equal(compiled(x), repeat(x))
    linear.weight.mul_(-1.5)
    assert equal(compiled(x), repeat(x))
    assert compiled.report.solved
    linear.weight = nn.Parameter(torch.randn(4, 4))
    assert equal(compiled(x), repeat(x))


def test_a_first_result_that_differs_demotes_the_block_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = BatchedMap.forward

    def rounds_otherwise(self: BatchedMap, *operands: Any) -> tuple[Any, ...]:
        return tuple(torch.nextafter(v, v + 1) for v in forward(self, *operands))

    monkeypatch.setattr(BatchedMap, "forward", rounds_otherwise)

    def heads(xs: torch.Tensor) -> torch.Tensor:
        return torch.stack([xs[t].sin() * 2 for t in range(64)])

    compiled = fxjacobi.compile(heads, measure=False)
    x = torch.randn(64, 5)
    with pytest.warns(fxjacobi.ExactnessWarning, match="sequentially"):
        assert equal(compiled(x), heads(x))
    assert equal(compiled(x), heads(x))
    assert {b.method for b in compiled.plan.blocks if b.kind is not None} == {"sequential"}
    assert any("differed" in b.reason for b in compiled.plan.blocks)


def test_a_fault_of_the_compiler_leaves_the_users_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a planted fault")

    monkeypatch.setattr(compiler, "pipeline", broken)
    compiled = fxjacobi.compile(_halve)
    x = torch.tensor([9.0])
    with pytest.warns(fxjacobi.CaptureWarning, match="a planted fault"):
        assert equal(compiled(x), _halve(x))
    with pytest.raises(RuntimeError, match="a planted fault"):
        fxjacobi.compile(_halve, strict=True)(x)


def test_refused_captures_warn_once_and_run() -> None:
    def through_numpy(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.numpy() + 1)

    compiled = fxjacobi.compile(through_numpy)
    x = torch.rand(3)
    with pytest.warns(fxjacobi.CaptureWarning, match="test_contract.py"):
        compiled(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(compiled(x), x + 1)
    assert compiled.plan.refusals
    with pytest.raises(fxjacobi.CaptureError, match="Remedy"):
        fxjacobi.compile(through_numpy, strict=True)(x)


def test_generators_and_iterators_run_as_they_are() -> None:
    def steps(x: torch.Tensor) -> Any:
        for _ in range(5):
            x = x / 2
            yield x

    def total(rows: Any) -> torch.Tensor:
        return sum((row * 2 for row in rows), start=torch.zeros(3))

    x = torch.rand(3)
    compiled, added = fxjacobi.compile(steps), fxjacobi.compile(total)

    def compare() -> None:
        for _ in range(3):
            assert equal(torch.stack(list(compiled(x))), torch.stack(list(steps(x))))
            assert equal(added(iter([x, x])), total([x, x]))

    with pytest.warns(fxjacobi.CaptureWarning, match=r"generator|iterator"):
        compare()


def test_objects_that_are_new_at_every_call_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxjacobi.module._MAX_SIGNATURES", 3)
    compiled = fxjacobi.compile(lambda f, x: f(x))
    for scale in range(6):
        x = torch.rand(3)
        assert equal(compiled(lambda y, scale=scale: y * scale, x), x * scale)
    assert len(compiled._specialisations) == 3


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"atol": float("nan")}, ValueError, "atol"),
        ({"rtol": "small"}, TypeError, "rtol"),
        ({"method": "magic"}, ValueError, "method"),
        ({"method": 3}, TypeError, "method"),
        ({"strict": 1}, TypeError, "strict"),
        ({"memory_limit": 0}, ValueError, "memory_limit"),
    ],
)
def test_wrong_options_name_the_argument(options: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        fxjacobi.compile(_halve, **options)


def test_not_a_callable() -> None:
    with pytest.raises(TypeError, match="model"):
        fxjacobi.compile(3)  # type: ignore[arg-type] # what is tested


def test_keyword_arguments_modules_and_nested_inputs() -> None:
    linear = nn.Linear(3, 3)

    def run(model: nn.Module, batch: dict[str, Any], *, steps: int, start: torch.Tensor | None = None) -> Any:
        x = batch["x"] if start is None else start
        for _ in range(steps):
            x = torch.round(model(x) + batch["more"][0])
        return {"x": x, "steps": steps}

    compiled = fxjacobi.compile(run, measure=False)
    for steps, start in ((5, None), (5, torch.rand(2, 3)), (7, None), (5, None)):
        batch = {"x": torch.rand(2, 3), "more": [torch.rand(3)]}
        found = compiled(linear, batch, steps=steps, start=start)
        wanted = run(linear, batch, steps=steps, start=start)
        assert found["steps"] == wanted["steps"]
        assert equal(found["x"], wanted["x"])
    assert len(compiled._specialisations) == 3


def test_straight_models_run_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    compiled = fxjacobi.compile(model)
    x = torch.rand(3, 4)
    assert equal(compiled(x), model(x))
    assert not compiled.plan.solved
    assert "no loop" in compiled.plan.reason
    assert set(dict(compiled.named_parameters())) == {f"_original.{n}" for n, _ in model.named_parameters()}


def test_plan_prints_draws_and_exports(tmp_path: Any) -> None:
    compiled = fxjacobi.compile(_repeat, measure=False)
    compiled(torch.rand(4) * 50)
    plan = compiled.plan
    assert "fixed_point" in str(plan)
    assert "test_contract.py:" in str(plan).replace("\n", "").replace(" ", "")
    graph = plan.to_networkx()
    assert set(graph) == {b.name for b in plan.blocks}
    assert plan.to_dot().startswith("digraph")
    plan.to_html(tmp_path / "plan.html")
    assert "fixed_point" in (tmp_path / "plan.html").read_text()
    assert "fixed_point" in compiled.stages["emit_solvers"].code
    assert next(iter(compiled.stages)) == "capture"


def _repeat(x: torch.Tensor) -> torch.Tensor:
    for _ in range(50):
        x = torch.floor(x / 2)
    return x


def test_explain_and_verify() -> None:
    x = torch.rand(4) * 50
    assert any(b.method == "fixed point" for b in fxjacobi.explain(_repeat, x).blocks)
    assert fxjacobi.verify(_repeat, x).tensors == 2


def test_verify_catches_a_wrong_module(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxjacobi.module import SolvedModule

    forward = SolvedModule.forward
    monkeypatch.setattr(SolvedModule, "forward", lambda self, *a, **k: forward(self, *a, **k) + 1)
    with pytest.raises(fxjacobi.ExactnessError, match="output 0"):
        fxjacobi.verify(_repeat, torch.rand(4) * 50)


class _MakesConstants(nn.Module):
    """Returns, and leaves behind, tensors that it makes of Python values."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        self.kept = torch.tensor([5.0, 6.0])
        for _ in range(20):
            x = torch.tanh(x * 0.5 + self.kept)
        return x, whole, whole.t(), whole[1], torch.tensor([7.0]), torch.tensor([7.0]), torch.tensor(8.0).expand(3)


class _Part(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        for _ in range(10):
            x = torch.tanh(x)
        return x, table[0]


class _CallsParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = _Part()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = []
        for _ in range(4):
            x, row = self.part(x)
            found.append(row)
        return x, *found


@pytest.mark.parametrize("kind", [_MakesConstants, _CallsParts])
def test_constants_that_a_call_returns_are_its_callers(kind: type[nn.Module]) -> None:
    model, plain = kind(), kind()
    compiled = fxjacobi.compile(model, measure=False)
    x = torch.rand(3, 2)
    for _ in range(3):
        found = [*compiled(x), getattr(model, "kept", x)]
        wanted = [*plain(x), getattr(plain, "kept", x)]
        assert all(equal(a, b) for a, b in zip(found, wanted, strict=True))
        shared = [[a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a in found] for b in found]
        assert shared == [
            [a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for a in wanted] for b in wanted
        ]
        for value in found[1:-1]:
            value[..., :1] = -1
        if isinstance(model, _MakesConstants):
            found[-1].zero_()
    assert compiled.report.solved
