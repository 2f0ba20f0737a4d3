"""Recurrent networks that read a digit row by row or pixel by pixel and predict what comes next, as plain Python loops.

One loop serves torch.nn's cells and hand-written ones; the state is a tuple, so that an LSTM is no special case.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody gives it
from digits import digits
from torch import Tensor, nn
from training import fit
from weights import pretrained

State = tuple[Tensor, ...]


class Cell(nn.Module):
    """One step of a recurrence: x (B, inputs) and the state, each part (B, hidden) -> the new state, output first."""

    parts = 1

    def forward(self, x: Tensor, state: State) -> State:
        """The state after x."""
        raise NotImplementedError


class TorchRNN(Cell):
    """torch.nn.RNNCell."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.RNNCell(inputs, hidden)

    def forward(self, x: Tensor, state: State) -> State:
        """tanh(W x + U h + b)."""
        return (self.cell(x, state[0]),)


class TorchGRU(Cell):
    """torch.nn.GRUCell."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.GRUCell(inputs, hidden)

    def forward(self, x: Tensor, state: State) -> State:
        """One GRU step."""
        return (self.cell(x, state[0]),)


class TorchLSTM(Cell):
    """torch.nn.LSTMCell."""

    parts = 2

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(inputs, hidden)

    def forward(self, x: Tensor, state: State) -> State:
        """One LSTM step."""
        hidden, memory = self.cell(x, (state[0], state[1]))
        return hidden, memory


class HandRNN(Cell):
    """softplus(W x + U h + b): the cell of the backpropagation experiment in arXiv 2002.03629."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, hidden)
        self.hidden = nn.Linear(hidden, hidden, bias=False)
        with torch.no_grad():  # softplus does not contract by itself
            self.hidden.weight.mul_(0.5)

    def forward(self, x: Tensor, state: State) -> State:
        """One step."""
        return (F.softplus(self.input(x) + self.hidden(state[0])),)


class HandGRU(Cell):
    """h' = (1 - z) n + z h, with the update gate z, the reset gate r and n = tanh(W x + r * (U h))."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(inputs, 3 * hidden)
        self.hidden = nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor, state: State) -> State:
        """One step."""
        xr, xz, xn = self.input(x).chunk(3, dim=-1)
        hr, hz, hn = self.hidden(state[0]).chunk(3, dim=-1)
        update = torch.sigmoid(xz + hz)
        candidate = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return ((1 - update) * candidate + update * state[0],)


class HandLSTM(Cell):
    """c' = f c + i tanh(g), h' = o tanh(c'), the gates affine in x and h."""

    parts = 2

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.gates = nn.Linear(inputs + hidden, 4 * hidden)

    def forward(self, x: Tensor, state: State) -> State:
        """One step."""
        i, f, g, o = self.gates(torch.cat([x, state[0]], dim=-1)).chunk(4, dim=-1)
        memory = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(memory), memory


CELLS: dict[str, type[Cell]] = {
    "rnn": TorchRNN,
    "gru": TorchGRU,
    "lstm": TorchLSTM,
    "hand_rnn": HandRNN,
    "hand_gru": HandGRU,
    "hand_lstm": HandLSTM,
}


class DigitReader(nn.Module):
    """(B, T, inputs) -> (B, T, inputs): after each element the prediction of the next one."""

    def __init__(self, cell: str, inputs: int, hidden: int = 128) -> None:
        super().__init__()
        self.cell = CELLS[cell](inputs, hidden)
        self.hidden = hidden
        self.head = nn.Linear(hidden, inputs)

    def forward(self, xs: Tensor) -> Tensor:
        """The ordinary loop: one step an element, a head on each state."""
        state: State = tuple(xs.new_zeros(xs.shape[0], self.hidden) for _ in range(self.cell.parts))
        predictions = []
        for t in range(xs.shape[1]):
            state = self.cell(xs[:, t], state)
            predictions.append(torch.sigmoid(self.head(state[0])))
        return torch.stack(predictions, dim=1)


def sequences(reading: str, size: int = 28) -> Tensor:
    """The digits as (1797, size, size) rows or (1797, size * size, 1) pixels."""
    images = digits(size)
    return images if reading == "rows" else images.flatten(1).unsqueeze(-1)


def next_element_error(model: DigitReader, xs: Tensor) -> Tensor:
    """Mean squared error of the predictions against the elements that follow."""
    return F.mse_loss(model(xs)[:, :-1], xs[:, 1:])


def train(model: DigitReader, xs: Tensor, *, steps: int, batch: int = 32, seed: int = 0) -> list[float]:
    """Train by backpropagation through the whole loop; the losses."""
    return fit(model, lambda x: next_element_error(model, x), xs, steps=steps, batch=batch, rate=5e-3, seed=seed)


def untrained(cell: str, reading: str) -> DigitReader:
    """A network as it is before training, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return DigitReader(cell, 28 if reading == "rows" else 1)


def train_reading(model: DigitReader, reading: str) -> list[float]:
    """Train on the digits at 28x28: 400 updates by rows, 120 by pixels, whose loops are 28 times longer."""
    return train(model, sequences(reading), steps=400 if reading == "rows" else 120)


def digits_model(cell: str, reading: str) -> DigitReader:
    """The network with one of `CELLS`, trained on the digits read by "rows" or by "pixels"."""
    return pretrained(f"rnn_{cell}_{reading}", untrained(cell, reading), lambda m: train_reading(m, reading))


def main() -> None:
    """Run each network ordinarily and compiled; print the times."""
    from compare import compare

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--reading", choices=("rows", "pixels"), default="pixels")
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    xs = sequences(arguments.reading)[: arguments.batch]
    for cell in arguments.cells:
        model = digits_model(cell, arguments.reading)
        with torch.no_grad():
            compare(f"{cell} by {arguments.reading}, T = {xs.shape[1]}, batch {arguments.batch}", model, xs)


if __name__ == "__main__":
    main()
