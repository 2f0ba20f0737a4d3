"""Weights of the example models, as safetensors: read where the repository has them, trained and cached where it has not.

`examples/weights/` holds what takes long to train, and what benchmarks should find the same everywhere, in bfloat16 where
float32 would pass 4 MiB. The rest is trained at its first use, in seconds, and kept in the user's cache folder
(`$XDG_CACHE_HOME/fxjacobi`, by default `~/.cache/fxjacobi`). Nothing is ever unpickled.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

Model = TypeVar("Model", bound=nn.Module)

SHIPPED = Path(__file__).resolve().parent / "weights"


def cache_folder() -> Path:
    """The folder for weights that are trained at their first use."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxjacobi"


def save(model: nn.Module, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the model's state, its floating-point tensors as `dtype`; a reader never sees half a file."""
    state = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    save_file(state, partial)
    partial.replace(path)


def load(model: nn.Module, path: Path) -> None:
    """Read the state that `save` wrote into `model`, which keeps its own dtypes and devices, and set eval mode.

    Raises:
        RuntimeError: the file's names or shapes are not the model's.
    """
    model.load_state_dict(load_file(path))
    model.eval()


def pretrained(name: str, model: Model, train: Callable[[Model], object]) -> Model:
    """`model` with the weights called `name`: the shipped ones, else the cached ones, else trained now and cached.

    Args:
        name: the file's name without its ending; it must tell the settings, which the file does not.
        model: is filled in place.
        train: trains the model in place; it runs only where no file is found.

    Returns:
        The model, in eval mode.
    """
    cached = cache_folder() / f"{name}.safetensors"
    for path in (SHIPPED / f"{name}.safetensors", cached):
        if path.exists():
            load(model, path)
            return model
    train(model)
    save(model, cached)
    model.eval()
    return model
