"""The recorder: what a recorded graph computes, what it leaves behind, and what it refuses."""

from __future__ import annotations

import random
from operator import getitem
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from fxjacobi import ops
from fxjacobi.capture import AttributeEffect, Capture, TensorEffect, ViewOfWritten, capture, record
from fxjacobi.errors import CaptureError, GuardFailed
from fxjacobi.graph import check, is_random
from fxjacobi.verify import equal

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        torch.manual_seed(0)
        yield


def _replay(fn: Callable[..., Any], *args: torch.Tensor) -> Capture:
    """Capture, then check that the graph gives on fresh values what the function gives."""
    captured = capture(fn, args)
    check(captured.graph_module, after="capture")
    fresh = [a.clone() if a.dtype in (torch.int64, torch.bool) else torch.rand_like(a) for a in args]
    wanted = fn(*[a.clone() for a in fresh])
    found = captured.graph_module(*fresh)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    values = [found[s] for s in captured.sources if isinstance(s, int)]
    for a, b in zip(values, wanted, strict=True):
        assert equal(a, b)
    return captured


def _targets(captured: Capture) -> list[Any]:
    return [node.target for node in captured.graph_module.graph.nodes if node.op == "call_function"]


def _writes_through_views(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    y = x * 2
    column, transposed = y[:, 1], y.t()
    column.add_(1)
    y[0] = 5
    transposed[1, 2] = 7
    y[1:, ::2].mul_(3)
    y.view(-1)[3] = -1
    y.diagonal().copy_(torch.arange(3.0))
    y.unsqueeze(0).squeeze().permute(1, 0)[2].neg_()
    return y, column, transposed, y.sum()


def _list_index(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[[2, 0]] = x[[0, 1]]
    y[y > 0.5] = 0
    y.index_fill_(1, torch.tensor([1]), 4.0)
    return y.masked_fill_(x > 0.7, 2)


def _splits(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    c, d, e = x.unbind(0)
    first, *_ = x.split([1, 1, 2], dim=1)
    a.add_(1) if a.requires_grad else None
    return torch.cat([a, b, first], -1) + c[0] * d[1] - e[2]


def _integers(x: torch.Tensor) -> torch.Tensor:
    counts = torch.zeros(3, dtype=torch.int64)
    counts += 2
    total = torch.zeros(3)
    total += counts
    total.div_(3)
    return x.sum() + total.cumsum(0) + torch.linspace(0, 1, 3)


@pytest.mark.parametrize("fn", [_writes_through_views, _list_index, _splits, _integers])
def test_graph_computes_what_the_function_computes(fn: Callable[..., Any]) -> None:
    _replay(fn, torch.rand(3, 4))


def test_tensors_made_of_python_values_are_literals() -> None:
    def turn(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]) + torch.tensor(0.5)
        return x

    captured = _replay(turn, torch.rand(3, 2))
    assert [n.op for n in captured.graph_module.graph.nodes].count("get_attr") == 2  # equal literals are one


def test_written_columns_are_one_write_each() -> None:
    def columns(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(2, 3, 4)
        for i in range(3):
            for j in range(4):
                out[:, i, j] = x[:, i, j].sin()
        return out

    captured = _replay(columns, torch.rand(2, 3, 4))
    writes = [n for n in captured.graph_module.graph.nodes if n.target is ops.write]
    assert [n.args[2] for n in writes] == [(None, i, j) for i in range(3) for j in range(4)]


def test_every_node_carries_the_users_line() -> None:
    captured = capture(lambda x: x.sin().cos(), (torch.rand(2),))
    sites = {str(n.meta["site"]) for n in captured.graph_module.graph.nodes if n.op == "call_function"}
    assert len(sites) == 1
    assert "test_capture.py:" in sites.pop()


def test_inputs_written_in_place_are_effects() -> None:
    def scale(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x.mul_(2)
        return x, x[1]

    x = torch.rand(3, 2)
    captured = capture(scale, (x.clone(),))
    (effect,) = captured.effects
    assert isinstance(effect, TensorEffect)
    assert effect.position == 0
    assert all(isinstance(s, ViewOfWritten) for s in captured.sources)
    assert torch.equal(captured.graph_module(x)[effect.value], x * 2)


def test_batch_norm_updates_its_buffers_as_effects() -> None:
    norm = nn.BatchNorm1d(4)
    captured = capture(norm, (torch.rand(5, 4),))
    targets = [e.target for e in captured.effects if isinstance(e, TensorEffect)]
    assert {id(t) for t in targets} == {id(b) for b in norm.buffers()}


def test_attributes_rebound_to_tensors_become_state() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state: torch.Tensor | None = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.state = x if self.state is None else self.state * 0.5 + x
            self.state = self.state + 0
            return self.state > 1

    cell = Cell()
    first = capture(cell, (torch.rand(3),))
    assert [type(e) for e in first.effects] == [AttributeEffect]
    assert first.states == ()
    second = capture(cell, (torch.rand(3),))
    assert [s.key for s in second.states] == ["state"]


def test_parameters_are_read_live() -> None:
    linear = nn.Linear(3, 2)
    captured = capture(linear, (torch.rand(4, 3),))
    linear.weight.data.mul_(2)
    x = torch.rand(4, 3)
    assert torch.equal(captured.graph_module(x)[0], linear(x))


def test_branches_are_guards() -> None:
    def halve(x: torch.Tensor) -> torch.Tensor:
        while x.abs().max() > 1:
            x = x / 2
        return x

    captured = capture(halve, (torch.tensor([3.0]),))
    assert _targets(captured).count(ops.guard) == 3
    with pytest.raises(GuardFailed):
        captured.graph_module(torch.tensor([5.0]))
    assert torch.equal(captured.graph_module(torch.tensor([2.5]))[0], torch.tensor([0.625]))


def test_lists_and_shapes_taken_from_data_are_guards() -> None:
    captured = capture(lambda x: (x[x > 0] * 2, x.tolist()), (torch.tensor([1.0, -1.0]),))
    assert {ops.guard_shape, ops.guard_list} <= set(_targets(captured))
    with pytest.raises(GuardFailed):
        captured.graph_module(torch.tensor([1.0, 1.0]))


def test_a_submodule_is_recorded_once() -> None:
    net = nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(4, 4), nn.Tanh())])

    def repeat(x: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            x = net(x)
        return x

    captured = _replay(repeat, torch.rand(3, 4))
    calls = [n for n in captured.graph_module.graph.nodes if n.op == "call_module"]
    assert len(calls) == 50
    assert len({n.target for n in calls}) == 1
    assert set(_targets(captured)) == {getitem}


@pytest.mark.parametrize("dirty", ["dropout", "branch", "attribute", "argument"])
def test_a_submodule_with_effects_is_recorded_in_line(dirty: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(4, 4), torch.zeros(())

        def forward(self, x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
            for _ in range(4):
                x = self.linear(x).tanh()
            if dirty == "dropout":
                x = nn.functional.dropout(x, 0.5, training=True)
            if dirty == "branch" and x.sum() > 100:
                x = x * 2
            if dirty == "attribute":
                self.calls += 1
            if dirty == "argument":
                buffer += 1
            return x

    net = Net()

    def repeat(x: torch.Tensor) -> torch.Tensor:
        buffer = torch.zeros(())
        for _ in range(6):
            x = net(x, buffer)
        return x + buffer

    captured = capture(repeat, (torch.rand(3, 4),))
    assert not [n for n in captured.graph_module.graph.nodes if n.op == "call_module"]


def test_draws_keep_their_order_and_values() -> None:
    def sample(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a = torch.rand(3)
        b = nn.functional.dropout(x.t(), 0.5)
        c = torch.empty(4, 3).t().uniform_()
        return a, b, c, torch.multinomial(x, 1), torch.randn(2)

    x = torch.rand(3, 4)
    captured = capture(sample, (x,))
    assert captured.draws
    assert sum(is_random(n) for n in captured.graph_module.graph.nodes) == 5
    torch.manual_seed(5)
    wanted = sample(x)
    torch.manual_seed(5)
    found = captured.graph_module(x)
    assert all(equal(found[s], w) for s, w in zip(captured.sources, wanted, strict=True) if isinstance(s, int))


def _to_numpy(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.numpy() * 2)


def _from_random(x: torch.Tensor) -> torch.Tensor:
    return x * random.random()


def _from_numpy_random(x: torch.Tensor) -> torch.Tensor:
    return x * float(np.random.rand())


def _resizes(x: torch.Tensor) -> torch.Tensor:
    return x.clone().resize_(2)


@pytest.mark.parametrize("fn", [_to_numpy, _from_random, _from_numpy_random, _resizes])
def test_what_cannot_be_recorded_is_refused_and_still_runs(fn: Callable[..., Any]) -> None:
    recorded = record(fn, (torch.rand(4),), {})
    assert recorded.capture is None
    assert isinstance(recorded.result, torch.Tensor)
    assert recorded.failure is not None
    assert recorded.failure.remedy
    with pytest.raises(CaptureError, match="Remedy"):
        capture(fn, (torch.rand(4),))


def test_counters_are_refused() -> None:
    class Counter(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    with pytest.raises(CaptureError, match="calls changed"):
        capture(Counter(), (torch.rand(2),))


def test_the_users_exception_passes_through_and_nothing_stays_patched() -> None:
    call, to_list = nn.Module.__call__, torch.Tensor.tolist

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        record(fails, (torch.rand(2),), {})
    assert nn.Module.__call__ is call
    assert torch.Tensor.tolist is to_list


def test_out_arguments_from_before_the_run_are_effects_with_what_they_held() -> None:
    buffer = torch.arange(4.0)

    def adds(x: torch.Tensor) -> torch.Tensor:
        torch.add(buffer, x, out=buffer)
        torch.mul(buffer[:2], 2, out=buffer[:2])
        return buffer * x

    captured = capture(adds, (torch.ones(4),))
    (effect,) = captured.effects
    assert isinstance(effect, TensorEffect)
    assert effect.saved is not None
    assert torch.equal(effect.saved, torch.arange(4.0))
    assert torch.equal(buffer, torch.tensor([2.0, 4.0, 3.0, 4.0]))


def _of_a_row(row: torch.Tensor) -> torch.Tensor:
    return torch.tanh(row * 0.5 + 0.01) + row.sum() * 0.1


def test_numbers_that_vmap_makes_tensors_of_are_constants() -> None:
    def mapped(x: torch.Tensor) -> torch.Tensor:
        each: Callable[..., torch.Tensor] = torch.vmap(_of_a_row)
        return each(x)

    captured = _replay(mapped, torch.rand(3, 4))
    assert all(
        isinstance(n.args[0], fx.Node) for n in captured.graph_module.graph.nodes if n.target is aten._to_copy.default
    )


def test_gradients_pass_detach_once() -> None:
    def stopped(x: torch.Tensor) -> torch.Tensor:
        y = x * 3
        return y + y.detach() * y + y.detach()[:1]

    with torch.enable_grad():
        captured = capture(stopped, (torch.rand(3, requires_grad=True),))
        assert captured.gradients
        a, b = torch.rand(3).requires_grad_(), torch.rand(3).requires_grad_()
        b.data.copy_(a.data)
        captured.graph_module(a)[0].sum().backward()
        stopped(b).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad, b.grad)
