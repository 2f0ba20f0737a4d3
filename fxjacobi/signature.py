"""The key under which specialisations are kept: everything that a graph depends on besides values."""

from __future__ import annotations

from typing import Any

import torch

from fxjacobi.aliasing import storage_key
from fxjacobi.arithmetic import arithmetic_state
from fxjacobi.placement import rounding_phase
from fxjacobi.trees import split

__all__ = ["signature"]

_WITH_MEMORY = (torch.Tensor, torch.nn.Parameter)


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """Return a hashable key of the call and its tensor arguments.

    Among what a graph depends on is where an argument starts in memory (:mod:`fxjacobi.placement`): the ordinary run's
    products round by it, so what was measured for an aligned argument says nothing about ``batch[1:]`` of odd rows.
    """
    skeleton, tensors = split((args, kwargs))
    storages = [storage_key(t) for t in tensors if t.layout is torch.strided]
    shared = tuple(storages.index(s) for s in storages) if len(set(storages)) < len(storages) else ()
    key = (
        skeleton,
        tuple([
            (t.shape, t.dtype, t.device, t.stride() if t.layout is torch.strided else t.layout, t.requires_grad, type(t),
             rounding_phase(t) if type(t) in _WITH_MEMORY and t.layout is torch.strided else 0)
            for t in tensors
        ]),
        shared,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        tuple([torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in ("cpu", "cuda")]),
        torch.get_default_dtype(),
        arithmetic_state(),
    )  # fmt: skip
    return key, tensors
