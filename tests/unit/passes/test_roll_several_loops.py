"""Rolling programs of several loops: one in another, one after another, one in a recorded module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxjacobi.loops import Literal, Scanned, Stacked
from fxjacobi.passes.roll_loops import RollLoops
from tests.unit.passes.programs import assert_runs_as, front, loops, record, roll, shape, targets

aten = torch.ops.aten
R = torch.randn


def test_a_stack_of_cells_in_either_loop_order() -> None:
    def time_outer(x: Any, h: Any, *w: Any) -> Any:
        states = [h] * len(w)
        out = []
        for t in range(10):
            y = x[:, t]
            for layer in range(len(w)):
                y = states[layer] = torch.tanh(y @ w[layer] + states[layer])
            out.append(y)
        return torch.stack(out, 1)

    def layer_outer(x: Any, h: Any, *w: Any) -> Any:
        xs = list(x.unbind(1))
        for weight in w:
            state, out = h, []
            for item in xs:
                state = torch.tanh(item @ weight + state)
                out.append(state)
            xs = out
        return torch.stack(xs, 1)

    for layers, fn, wanted in (
        (2, time_outer, [10]),
        (4, time_outer, [(10, [4])]),
        (2, layer_outer, [10, 10]),
        (4, layer_outer, [(4, [10])]),
    ):
        args = [R(2, 10, 4), R(2, 4), *[R(4, 4) for _ in range(layers)]]
        rolled = front(record(fn, *args))
        assert_runs_as(rolled, fn, *args)
        assert shape(rolled) == wanted


def test_a_later_loop_scans_the_stacked_results_of_an_earlier_one() -> None:
    def two(x: Any, w: Any, v: Any) -> Any:
        out, h = [], torch.zeros(2, 4)
        for t in range(10):
            h = torch.tanh(x[:, t] @ w + h)
            out.append(h)
        h = torch.zeros(2, 4)
        for item in reversed(out):
            h = torch.sin(item @ v + h)
        return h

    args = R(2, 10, 4), R(4, 4), R(4, 4)
    rolled = front(record(two, *args))
    assert_runs_as(rolled, two, *args)
    first, second = loops(rolled)
    assert first.results == (Stacked(0),)
    assert any(isinstance(b, Scanned) and b.dim == 0 and b.indices == range(9, -1, -1) for b in second.bindings)
    assert aten.select.int not in targets(rolled)


def test_both_directions() -> None:
    def both(x: Any, w: Any, v: Any, h: Any) -> Any:
        forwards, backwards = [], []
        state = h
        for t in range(8):
            state = torch.tanh(x[:, t] @ w + state)
            forwards.append(state)
        state = h
        for t in reversed(range(8)):
            state = torch.tanh(x[:, t] @ v + state)
            backwards.append(state)
        return torch.cat([torch.stack(forwards, 1), torch.stack(backwards[::-1], 1)], 2)

    args = R(2, 8, 4), R(4, 4), R(4, 4), R(2, 4)
    rolled = roll(record(both, *args))
    assert_runs_as(rolled, both, *args)
    assert shape(rolled) == [8, 8]
    backwards = loops(rolled)[1]
    assert any(isinstance(b, Scanned) and b.indices == range(7, -1, -1) for b in backwards.bindings)
    assert aten.flip.default in targets(rolled)


def test_a_raster_of_writes_is_a_loop_in_a_loop() -> None:
    def raster(x: Any, w: Any) -> Any:
        y = torch.zeros(2, 5, 6)
        for i in range(5):
            for j in range(6):
                y[:, i, j] = torch.tanh(x[:, i, j] + (y * w[i, j]).sum((1, 2)))
        return y

    args = R(2, 5, 6), R(5, 6)
    rolled = front(record(raster, *args))
    assert_runs_as(rolled, raster, *args)
    assert shape(rolled) == [(5, [6])]
    (outer,) = loops(rolled)
    assert any(isinstance(b, Literal) and b.values == (0, 1, 2, 3, 4) for b in outer.bindings)


def test_the_row_above_and_the_value_to_the_left() -> None:
    def rows(x: Any, a: Any) -> Any:
        above, lines = [a] * 7, []
        for i in range(5):
            left, line = a, []
            for j in range(7):
                left = torch.tanh(left + above[j] * x[i, j])
                line.append(left)
            above = line
            lines.append(torch.stack(line))
        return torch.stack(lines)

    args = R(5, 7), R(3)
    rolled = front(record(rows, *args))
    assert_runs_as(rolled, rows, *args)
    assert shape(rolled) == [(5, [7])]


def test_a_triangle_rolls_row_by_row() -> None:
    def triangle(x: Any, a: Any) -> Any:
        for i in range(12):
            a = torch.sin(a)
            for j in range(i):
                a = torch.tanh(a + x[j])
        return a

    args = R(12, 3), R(3)
    rolled = front(record(triangle, *args))
    assert_runs_as(rolled, triangle, *args)
    # The last step of row i is the first to read x[i - 1], so it differs; the first rows are too short.
    assert [loop.trip_count for loop in loops(rolled)] == list(range(4, 11))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))
        self.embedding = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_a_module_recorded_once_is_inlined_in_the_body_and_its_layers_roll() -> None:
    net = Net()

    def sample(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros(2, 3)
        for t in range(7):
            y = torch.sin(net(y)[:, :3] + x[t])
        return y

    module = record(sample, R(7, 2, 3))
    rolled = roll(module)
    assert_runs_as(rolled, sample, R(7, 2, 3))
    assert shape(rolled) == [(7, [5])]
    kept = RollLoops(inline=False).run(module).module
    assert_runs_as(kept, sample, R(7, 2, 3))
    if any(node.op == "call_module" for node in module.graph.nodes):
        assert shape(kept) == [7]
