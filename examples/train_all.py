"""Train the shipped weights anew: `python examples/train_all.py NAME ...`, every one where no name is given."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from weights import SHIPPED, save


@dataclass(frozen=True)
class Recipe:
    """How one file of weights is made: an untrained model, its training, and the type its numbers are stored in."""

    build: Callable[[], nn.Module]
    train: Callable[[nn.Module], list[float]]
    dtype: torch.dtype = torch.float32


def recipes() -> dict[str, Recipe]:
    """Every shipped file, by its name without ending."""
    import ddim
    import made
    import pixel_transformer
    import pixelcnnpp
    import rnn_digits

    return {
        "made_784": Recipe(made.untrained_digits, made.train_digits, torch.bfloat16),
        "pixelcnnpp_small": Recipe(pixelcnnpp.untrained_digits, pixelcnnpp.train),
        "pixel_transformer": Recipe(pixel_transformer.untrained, pixel_transformer.train),
        "ddim": Recipe(ddim.untrained, ddim.train),
    }


def main() -> None:
    """Train and save the weights named on the command line."""
    known = recipes()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    for name in parser.parse_args().names or list(known):
        recipe = known[name]
        model = recipe.build()
        start = time.perf_counter()
        losses = recipe.train(model)
        save(model, SHIPPED / f"{name}.safetensors", recipe.dtype)
        print(f"{name}: {len(losses)} steps in {time.perf_counter() - start:.1f} s, loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
