"""Train the shipped weights anew: `python examples/train_all.py NAME ...`, every one where no name is given."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Generic, TypeVar

import ddim
import made
import pixel_transformer
import pixelcnnpp
import rnn_digits
import torch
from torch import nn
from weights import SHIPPED, save

if TYPE_CHECKING:
    from collections.abc import Callable

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Recipe(Generic[Model]):
    """How one file of weights is made: an untrained model, its training, and the type its numbers are stored in."""

    build: Callable[[], Model]
    train: Callable[[Model], list[float]]
    dtype: torch.dtype = torch.float32

    def run(self, name: str) -> None:
        """Train and save."""
        model = self.build()
        start = time.perf_counter()
        losses = self.train(model)
        seconds = time.perf_counter() - start
        save(model, SHIPPED / f"{name}.safetensors", self.dtype)
        print(f"{name}: {len(losses)} steps in {seconds:.1f} s, loss {losses[0]:.3f} -> {losses[-1]:.3f}", flush=True)


def recipes() -> dict[str, Callable[[str], None]]:
    """What makes every shipped file, by the file's name without ending."""
    makers: dict[str, Callable[[str], None]] = {
        "made_784": Recipe(made.untrained_digits, made.train_digits, torch.bfloat16).run,
        "pixelcnnpp_small": Recipe(pixelcnnpp.untrained_digits, pixelcnnpp.train).run,
        "pixel_transformer": Recipe(pixel_transformer.untrained, pixel_transformer.train).run,
        "ddim": Recipe(ddim.untrained, ddim.train).run,
    }
    for cell in rnn_digits.CELLS:
        for reading in ("rows", "pixels"):
            build = partial(rnn_digits.untrained, cell, reading)
            train = partial(rnn_digits.train_reading, reading=reading)
            makers[f"rnn_{cell}_{reading}"] = Recipe(build, train).run
    return makers


def main() -> None:
    """Train and save the weights named on the command line."""
    known = recipes()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    for name in parser.parse_args().names or list(known):
        known[name](name)


if __name__ == "__main__":
    main()
