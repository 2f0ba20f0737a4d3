"""What a specialisation is valid for: every kind of Python value that a run may have read, and no more than that."""

from __future__ import annotations

import array
import collections
import contextlib
import contextvars
import functools
import itertools
import logging
import sys
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

import fxjacobi
from fxjacobi.errors import CaptureWarning
from fxjacobi.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

settings = types.ModuleType("settings")
settings.scale = 0.5  # type: ignore[attr-defined]
sys.modules["settings_of_test_watch"] = settings
variable: contextvars.ContextVar[float] = contextvars.ContextVar("variable", default=0.5)


def steps(x: torch.Tensor, scale: float) -> torch.Tensor:
    for _ in range(40):
        x = torch.tanh(x * scale + 1)
    return x


class Table:
    scale = 0.5
    values: ClassVar[dict[str, float]] = {"scale": 0.5}


@dataclass(slots=True)
class Slotted:
    scale: float = 0.5


class Model:
    """Reads its scale in a way that a test chooses, and keeps books that it does not read."""

    scale = 0.5
    table = Table

    def __init__(self, how: str) -> None:
        self.how, self.epoch, self.losses = how, 0, list[float]()
        self.slotted, self.array = Slotted(), np.full(3, 0.5)
        self.queue, self.set, self.numbers = collections.deque([0.5]), {0.5}, array.array("d", [0.5])

    def read(self) -> float:
        reads: dict[str, Callable[[], Any]] = {
            "class": lambda: self.scale,
            "other class": lambda: Table.scale,
            "class by attribute": lambda: self.table.scale,
            "dictionary of a class": lambda: Table.values["scale"],
            "module": lambda: settings.scale,
            "slots": lambda: self.slotted.scale,
            "NumPy": lambda: float(self.array[0]),
            "deque": lambda: self.queue[-1],
            "set": lambda: max(self.set),
            "array": lambda: self.numbers[0],
            "context variable": variable.get,
            "method": lambda: self.method() + 0.0,
        }
        return float(reads[self.how]())

    def method(self) -> float:
        return 0.5

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return steps(x, self.read())

    def fit(self) -> None:
        self.epoch += 1
        self.losses.append(0.0)
        self.optimizer = self.epoch


CHANGES: dict[str, Callable[[Model], object]] = {
    "class": lambda m: setattr(Model, "scale", 0.3),
    "other class": lambda m: setattr(Table, "scale", 0.3),
    "class by attribute": lambda m: setattr(Table, "scale", 0.3),
    "dictionary of a class": lambda m: Table.values.update(scale=0.3),
    "module": lambda m: setattr(settings, "scale", 0.3),
    "slots": lambda m: setattr(m.slotted, "scale", 0.3),
    "NumPy": lambda m: m.array.fill(0.3),
    "deque": lambda m: m.queue.append(0.3),
    "set": lambda m: m.set.add(0.7),
    "array": lambda m: m.numbers.__setitem__(0, 0.3),
    "context variable": lambda m: variable.set(0.3),
    "method": lambda m: setattr(Model, "method", lambda _: 0.3),
}


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "scale", 0.5)
    monkeypatch.setattr(Model, "method", Model.method)
    monkeypatch.setattr(Table, "scale", 0.5)
    monkeypatch.setattr(Table, "values", {"scale": 0.5})
    monkeypatch.setattr(settings, "scale", 0.5)
    variable.set(0.5)


@torch.no_grad()
@pytest.mark.parametrize("how", sorted(CHANGES))
def test_a_value_that_the_run_reads_is_watched(how: str) -> None:
    model, x = Model(how), torch.randn(3)
    compiled = fxjacobi.compile(model.run, measure=False)
    for call in range(3):
        assert torch.equal(compiled(x), model.run(x))
        assert compiled.report.solved == (call > 0)
    before = model.run(x)
    CHANGES[how](model)
    assert not torch.equal(before, model.run(x))
    for call in range(2):
        assert torch.equal(compiled(x), model.run(x))
        assert compiled.report.solved == (call > 0)


@torch.no_grad()
def test_a_value_that_the_run_does_not_read_is_not_watched() -> None:
    model, x = Model("class"), torch.randn(3)
    compiled = fxjacobi.compile(model.run, measure=False)
    for call in range(4):
        assert torch.equal(compiled(x), model.run(x))
        assert compiled.report.solved == (call > 0)
        model.fit()


@torch.no_grad()
def test_an_attribute_that_is_read_by_a_computed_name_is_watched() -> None:
    class Layers:
        def __init__(self) -> None:
            self.scale_0 = self.scale_1 = 0.5

        def run(self, x: torch.Tensor) -> torch.Tensor:
            return steps(x, max(getattr(self, f"scale_{i}") for i in range(2)))

    layers, x = Layers(), torch.randn(3)
    compiled = fxjacobi.compile(layers.run, measure=False)
    for scale in (0.5, 0.5, 0.7, 0.7):
        layers.scale_1 = scale
        assert torch.equal(compiled(x), layers.run(x))
    assert compiled.report.solved


@torch.no_grad()
def test_an_attribute_that_appears_is_seen_if_it_is_read() -> None:
    class Cached:
        def run(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return steps(x, self.scale)  # type: ignore[attr-defined]
            except AttributeError:
                return steps(x, 0.5)

    model, x = Cached(), torch.randn(3)
    compiled = fxjacobi.compile(model.run, measure=False)
    for name in ("nothing", "other", "scale", "scale"):
        setattr(model, name, 0.2)
        assert torch.equal(compiled(x), model.run(x))
    assert compiled.report.solved


@pytest.mark.parametrize(
    "iterator", [itertools.count(1), iter([0.1] * 99), itertools.cycle([0.1, 0.2])], ids=["count", "list", "cycle"]
)
def test_an_iterator_that_the_run_uses_up_is_refused(iterator: Any) -> None:
    class Source:
        def __init__(self) -> None:
            self.values = iterator

        def run(self, x: torch.Tensor) -> torch.Tensor:
            return steps(x, next(self.values) / 10)

    with pytest.warns(CaptureWarning, match="iterator"):
        fxjacobi.compile(Source().run)(torch.randn(3))


def test_a_cache_that_the_run_fills_is_recorded_when_it_is_full() -> None:
    @functools.lru_cache
    def noise() -> float:
        return float(len(calls))

    def run(x: torch.Tensor) -> torch.Tensor:
        return steps(x, 0.1 * noise())

    calls = [0]
    compiled, x = fxjacobi.compile(run, measure=False), torch.randn(3)
    with torch.no_grad():
        for call in range(3):
            assert torch.equal(compiled(x), run(x))
            assert compiled.report.solved == (call > 1)


@pytest.mark.parametrize("make", [list, lambda: dict.fromkeys("h"), Slotted], ids=["list", "dict", "dataclass"])
def test_what_the_run_puts_into_its_arguments_is_refused(make: Callable[[], Any]) -> None:
    def run(x: torch.Tensor, log: Any) -> torch.Tensor:
        x = steps(x, 0.5)
        if isinstance(log, list):
            log.append(x)
        elif isinstance(log, dict):
            log["h"] = x
        else:
            log.scale = x
        return x

    compiled = fxjacobi.compile(run, measure=False)
    for call in range(3):
        log, other, x = make(), make(), torch.randn(3)
        warned = pytest.warns(CaptureWarning, match="it was passed") if call == 1 else contextlib.nullcontext()
        with warned:
            found = compiled(x, log)
        assert torch.equal(found, run(x, other))
        assert repr(log) == repr(other)


def change_half(linear: nn.Linear) -> None:
    linear.double()


def change_shape(linear: nn.Linear) -> None:
    linear.weight.data = torch.randn(3, 3).t()


@torch.no_grad()
@pytest.mark.parametrize("change", [change_half, change_shape])
def test_weights_that_look_otherwise_are_seen(change: Callable[[nn.Linear], None]) -> None:
    linear = nn.Linear(3, 3)

    def run() -> torch.Tensor:
        x = torch.ones(2, 3, dtype=linear.weight.dtype)
        for _ in range(40):
            x = torch.tanh(linear(x))
        return x

    compiled = fxjacobi.compile(run, measure=False)
    compiled()
    assert torch.equal(compiled(), run())
    assert compiled.report.solved
    change(linear)
    assert torch.equal(compiled(), run())
    assert not compiled.report.solved


def test_weights_that_are_frozen_and_thawed() -> None:
    linear = nn.Linear(3, 3).requires_grad_(False)

    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            x = torch.tanh(linear(x))
        return x

    compiled, x = fxjacobi.compile(run, measure=False), torch.randn(2, 3)
    for thawed in (False, False, True, True, False):
        linear.requires_grad_(thawed)
        assert compiled(x).requires_grad == thawed


def tenth(_: nn.Module, gradients: Any) -> tuple[torch.Tensor]:
    return (gradients[0] * 0.1,)


@pytest.mark.filterwarnings("ignore:runs as it is:fxjacobi.errors.CaptureWarning")
def test_backward_hooks_are_seen() -> None:
    linear = nn.Linear(3, 3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(4):
                x = torch.tanh(self.linear(x))
            return x

    net, x = Net(), torch.randn(2, 3, requires_grad=True)
    compiled = fxjacobi.compile(net, measure=False)
    compiled(x), compiled(x)
    linear.register_full_backward_pre_hook(tenth)
    gradients: list[torch.Tensor] = []
    for run in (compiled, net):
        linear.zero_grad()
        run(x).sum().backward()
        gradient: Any = linear.weight.grad
        gradients.append(gradient.clone())
    assert torch.equal(*gradients)


@torch.no_grad()
def test_hooks_on_all_modules_are_seen() -> None:
    net, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), torch.randn(2, 3)

    def run(x: torch.Tensor) -> torch.Tensor:
        for _ in range(40):
            x = net(x)
        return x

    compiled = fxjacobi.compile(run, measure=False)
    compiled(x), compiled(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, result: result * 0.5)
    try:
        before = run(x)
        compiled.forward(x)
        assert "hooks on all modules" in compiled.report.reason
        assert torch.equal(compiled.forward(x), before)
    finally:
        handle.remove()
    assert torch.equal(compiled(x), run(x))
    assert compiled.report.solved


@torch.no_grad()
def test_large_tables_count_only_where_the_run_reads_them() -> None:
    class WithTable:
        def __init__(self) -> None:
            self.scale, self.table = 0.5, [[float(i)] for i in range(300_000)]

        def run(self, x: torch.Tensor) -> torch.Tensor:
            return steps(x, self.scale)

        def read(self, x: torch.Tensor) -> torch.Tensor:
            return steps(x, self.table[1][0])

    model, x = WithTable(), torch.randn(3)
    compiled = fxjacobi.compile(model.run, measure=False)
    for scale in (0.5, 0.5, 0.3, 0.3):
        model.scale = scale
        assert torch.equal(compiled(x), model.run(x))
    assert compiled.report.solved
    with pytest.warns(CaptureWarning, match="too many Python values"):
        fxjacobi.compile(model.read)(x)


def test_a_logger_leads_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    class Logged:
        def __init__(self) -> None:
            self.logger = logging.getLogger("test_watch")
            self.logger.addHandler(caplog.handler)

        def run(self, x: torch.Tensor) -> torch.Tensor:
            self.logger.info("running")
            return steps(x, 0.5)

    watch = Watch()
    watch.add(Logged().run, "")
    assert len(watch) < 100
