"""Small programs in the styles that users write, each with a maker of inputs; used by the exactness tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """A model's maker and a maker of its arguments; ``kinds`` are block kinds that its plan must hold."""

    name: str
    make: Callable[[], Callable[..., Any]]
    inputs: Callable[[], tuple[Any, ...]]
    kinds: tuple[str, ...] = ()


def _repeat(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    for _ in range(40):
        x = torch.floor((x + y) / 2)
    return x


def _period_two(x: torch.Tensor) -> torch.Tensor:
    for _ in range(31):
        x = 1 - x
    return x


def _iterates(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logdet = torch.zeros(x.shape[0])
    seen = []
    for _ in range(12):
        x = (x * 0.5).round()
        logdet = logdet + x.abs().sum(-1)
        seen.append(x)
    return logdet, seen


def _sinkhorn(logits: torch.Tensor) -> torch.Tensor:
    for _ in range(20):
        logits = logits - torch.logsumexp(logits, -1, keepdim=True)
        logits = logits - torch.logsumexp(logits, -2, keepdim=True)
    return logits.exp()


def _power(matrix: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    for _ in range(60):
        v = matrix @ v
        v = v / v.norm()
    return v


class _Rnn(nn.Module):
    def __init__(self, cell: Callable[[int, int], nn.Module], layers: int, time_outside: bool, write: bool) -> None:
        super().__init__()
        self.cells = nn.ModuleList([cell(6, 6) for _ in range(layers)])
        self.time_outside, self.write = time_outside, write

    def forward(self, xs: torch.Tensor) -> torch.Tensor:
        batch, steps, _ = xs.shape
        states: list[Any] = [None] * len(self.cells)
        out = torch.empty(batch, steps, 6) if self.write else None
        gathered = []
        if self.time_outside:
            for t in range(steps):
                x = xs[:, t]
                for i, cell in enumerate(self.cells):
                    states[i] = cell(x, states[i])
                    x = states[i][0] if isinstance(states[i], tuple) else states[i]
                if out is not None:
                    out[:, t] = x
                else:
                    gathered.append(x)
            return out if out is not None else torch.stack(gathered, 1)
        for cell in self.cells:
            state = None
            gathered = []
            for t in range(steps):
                state = cell(xs[:, t], state)
                gathered.append(state[0] if isinstance(state, tuple) else state)
            xs = torch.stack(gathered, 1)
        return xs


class _Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.forth, self.back = nn.GRUCell(5, 4), nn.GRUCell(5, 4)

    def forward(self, xs: torch.Tensor) -> torch.Tensor:
        steps = xs.shape[0]
        f = b = torch.zeros(xs.shape[1], 4)
        forward: list[torch.Tensor] = []
        backward: list[torch.Tensor] = []
        for t in range(steps):
            f = self.forth(xs[t], f)
            b = self.back(xs[steps - 1 - t], b)
            forward.append(f)
            backward.insert(0, b)
        return torch.cat([torch.stack(forward), torch.stack(backward)], -1)


class _SecondOrder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.u, self.v = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, xs: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(xs.shape[0], xs.shape[1], 4)
        for t in range(xs.shape[1]):
            s = torch.tanh(self.u(xs[:, t]))
            if t >= 2:
                s = s + self.v(out[:, t - 2])
            out[:, t] = s
        return out


class _Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)) for _ in range(6)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([head(x) for head in self.heads], 1)


class _PerStepHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 2)

    def forward(self, xs: torch.Tensor) -> list[torch.Tensor]:
        return [self.head(xs[:, t]).softmax(-1) for t in range(xs.shape[1])]


class _Spiking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.membrane: torch.Tensor | None = None

    def forward(self, xs: torch.Tensor) -> torch.Tensor:
        if self.membrane is None:
            self.membrane = torch.zeros_like(xs[0])
        spikes = []
        for t in range(xs.shape[0]):
            self.membrane = self.membrane * 0.9 + xs[t]
            spike = (self.membrane > 1).to(xs.dtype)
            self.membrane = self.membrane - spike
            spikes.append(spike)
        return torch.stack(spikes)


class _Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, xs: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            xs = self.norm(xs) * 2
        return xs


class _Result(NamedTuple):
    last: torch.Tensor
    all: dict[str, Any]


def _structures(x: torch.Tensor) -> _Result:
    h = torch.zeros_like(x[0])
    rows = []
    for t in range(x.shape[0]):
        h = h * 0.5 + x[t].sin()
        rows.append(h)
    return _Result(h, {"rows": tuple(rows), "none": None, "view": rows[1][:2], "name": "x", "pair": [rows[0], rows[0]]})


def _in_place(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    for t in range(1, x.shape[1]):
        x[:, t] += x[:, t - 1] * 0.5
    buffer.add_(x.sum())
    return x


def _adaptive(x: torch.Tensor) -> torch.Tensor:
    error = torch.tensor(1.0)
    while error > 1e-3:
        y = torch.cos(x)
        error = (y - x).abs().max()
        x = y
    return x


def _early_break(x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros_like(x[0])
    for t in range(x.shape[0]):
        total = total + x[t].relu()
        if total.sum() > 10:
            break
    return total


def _draws(n: int) -> torch.Tensor:
    x = torch.zeros(n)
    rows = []
    for _ in range(6):
        x = 0.9 * x + 0.1 * torch.randn(n)
        rows.append(x)
    return torch.stack(rows)


def _nested(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    state = torch.zeros(x.shape[0])
    for i in range(x.shape[1]):
        row = x[:, i] * 2
        for j in range(x.shape[2]):
            state = (state + row[:, j]).tanh()
            out[:, i, j] = state
    return out


def _literals(x: torch.Tensor) -> torch.Tensor:
    for t in range(9):
        x = x + 0.1 * (t + 1) * x.sin()
    return x


def _integers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, flag = x, x > 0
    for t in range(8):
        a = (a * 3 + t) % 17
        flag = flag ^ (a > 8)
    return a, flag


def _complex(z: torch.Tensor) -> torch.Tensor:
    for _ in range(7):
        z = z * z + 0.1j
    return z


def _maker(cell: type[nn.Module], layers: int, outside: bool, write: bool) -> Callable[[], nn.Module]:
    return lambda: _Rnn(_cell(cell), layers, outside, write)


def _cell(cell: type[nn.Module]) -> Callable[[int, int], nn.Module]:
    return cell


def _sequence() -> tuple[Any, ...]:
    return (torch.randn(3, 11, 6),)


CASES = [
    Case("repeat", lambda: _repeat, lambda: (torch.randint(0, 99, (4, 5)).float(), torch.ones(4, 5)), ("fixed_point",)),
    Case("period two", lambda: _period_two, lambda: (torch.rand(5).round(),), ("fixed_point",)),
    Case("iterates and log-determinants", lambda: _iterates, lambda: (torch.randn(3, 4) * 50,), ("fixed_point",)),
    Case("sinkhorn", lambda: _sinkhorn, lambda: (torch.randn(2, 5, 5),), ("fixed_point",)),
    Case("power iteration", lambda: _power, lambda: (torch.rand(6, 6), torch.rand(6)), ("fixed_point",)),
    *[
        Case(
            f"{cell.__name__}, {layers} layers, time {'outside' if outside else 'inside'}{', written' if write else ''}",
            _maker(cell, layers, outside, write),
            _sequence,
            ("recurrence",),
        )
        for cell in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)
        for layers, outside, write in ((1, True, False), (2, True, True), (2, False, False), (3, True, False))
    ],
    Case("bidirectional", _Bidirectional, lambda: (torch.randn(9, 2, 5),), ("recurrence",)),
    Case("second order through an array", _SecondOrder, lambda: (torch.randn(3, 12, 4),), ("map", "recurrence")),
    Case("heads", _Heads, lambda: (torch.randn(5, 8),), ("map",)),
    Case("a head at every step", _PerStepHead, lambda: (torch.randn(5, 9, 5),), ("map",)),
    Case("nn.LSTM", lambda: nn.LSTM(4, 5, 2, bidirectional=True), lambda: (torch.randn(7, 2, 4),)),
    Case("nn.GRU", lambda: nn.GRU(4, 5, 2), lambda: (torch.randn(7, 2, 4),)),
    Case("spiking cell", _Spiking, lambda: (torch.rand(9, 4),), ("recurrence",)),
    Case("batch norm in training mode", _Norms, lambda: (torch.randn(6, 4),)),
    Case("structures", lambda: _structures, lambda: (torch.randn(6, 4),)),
    Case("in place", lambda: _in_place, lambda: (torch.randn(3, 8), torch.zeros(()))),
    Case("adaptive", lambda: _adaptive, lambda: (torch.rand(4),)),
    Case("early break", lambda: _early_break, lambda: (torch.rand(20, 3) * 2,)),
    Case("draws", lambda: _draws, lambda: (5,), ("recurrence",)),
    Case("nested", lambda: _nested, lambda: (torch.randn(2, 5, 6),), ("recurrence",)),
    Case("literals", lambda: _literals, lambda: (torch.randn(4),), ("recurrence",)),
    Case("integers and bools", lambda: _integers, lambda: (torch.randint(0, 99, (5,)),)),
    Case("complex", lambda: _complex, lambda: (torch.randn(4, dtype=torch.complex64) * 0.3,), ("fixed_point",)),
    Case("bfloat16", lambda: _literals, lambda: (torch.randn(40).bfloat16(),)),
    Case("float64, not contiguous", lambda: _literals, lambda: (torch.randn(4, 6, dtype=torch.float64).t(),)),
    Case("infinities and NaN", lambda: _literals, lambda: (torch.tensor([float("inf"), float("nan"), -0.0, 1.0]),)),
    Case("batch 0", lambda: _Rnn(_cell(nn.GRUCell), 1, True, False), lambda: (torch.randn(0, 5, 6),)),
    Case("one step", lambda: _Rnn(_cell(nn.GRUCell), 1, True, False), lambda: (torch.randn(2, 1, 6),)),
    Case("two steps", lambda: _Rnn(_cell(nn.GRUCell), 1, True, True), lambda: (torch.randn(2, 2, 6),)),
    Case("no steps", lambda: _in_place, lambda: (torch.randn(3, 0), torch.zeros(()))),
]
