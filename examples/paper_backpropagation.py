"""The backpropagation experiment of Song et al. (arXiv 2002.03629, section 5.1) with nothing written by hand for it.

A recurrent network with 128 softplus units reads digits at 10x10, pixel by pixel (T = 100), and predicts the next pixel;
batch 1, learning rate 1e-4. The paper keeps the forward run sequential and gives the gradients of the states a fixed number
of Jacobi sweeps, so they are truncated. Here one call compiles the network: forward states and their adjoint are both
triangular systems, and both are solved within the tolerance.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import torch
from rnn_digits import DigitReader, next_element_error, sequences
from torch import Tensor, nn

import fxjacobi

if TYPE_CHECKING:
    from collections.abc import Callable


def network(seed: int = 0) -> DigitReader:
    """The network before training, the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitReader("hand_rnn", 1, 128)


def pixels() -> Tensor:
    """The digits at 10x10 as (1797, 100, 1)."""
    return sequences("pixels", 10)


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor], xs: Tensor) -> list[Tensor]:
    """The gradients of the loss with respect to the parameters of `model`, which `run` runs."""
    loss = nn.functional.mse_loss(run(xs)[:, :-1], xs[:, 1:])
    return list(torch.autograd.grad(loss, list(model.parameters())))


def train(model: nn.Module, run: Callable[[Tensor], Tensor], xs: Tensor, *, updates: int) -> tuple[list[float], float]:
    """Train by `run`, one sequence an update; the losses, and the seconds that the updates took."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    start = time.perf_counter()
    for row in range(updates):
        x = xs[row : row + 1]
        loss = nn.functional.mse_loss(run(x)[:, :-1], x[:, 1:])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses, time.perf_counter() - start


def main() -> None:
    """Train both ways from the same weights and print times and the largest difference of the losses."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--rtol", type=float, default=1e-5)
    arguments = parser.parse_args()
    xs = pixels()
    ordinary, solved = network(), network()
    compiled = fxjacobi.compile(solved, rtol=arguments.rtol)
    gradients(solved, compiled, xs[:1])  # records and plans
    gradients(solved, compiled, xs[:1])
    wanted, ordinary_s = train(ordinary, ordinary, xs, updates=arguments.updates)
    found, solved_s = train(solved, compiled, xs, updates=arguments.updates)
    print(compiled.plan)
    difference = max(abs(a - b) / a for a, b in zip(wanted, found, strict=True))
    print(f"{arguments.updates} updates: ordinary {ordinary_s:.3f} s, solved {solved_s:.3f} s")
    print(f"{ordinary_s / solved_s:.2f} times faster; losses differ by {difference:.1e} at most")
    with torch.no_grad():
        print(f"error over 100 digits after training: {next_element_error(solved, xs[:100]):.4f}")


if __name__ == "__main__":
    main()
