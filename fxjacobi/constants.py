"""Tensors of Python numbers, made once for a captured program: a capture cannot copy from the host."""

from __future__ import annotations

import contextlib
import functools
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Constants", "constant", "held", "positions"]

Constants = dict[tuple[Any, ...], torch.Tensor]
"""What a captured program holds on to: its graph reads these tensors' memory for as long as it lives."""

_KEPT = 1024
"""Numbers of a tensor that is kept for good."""

_held: ContextVar[Constants | None] = ContextVar("fxjacobi_constants", default=None)


@contextlib.contextmanager
def held(constants: Constants) -> Iterator[None]:
    """Inside, :func:`constant` keeps what it makes in ``constants``, and returns it again; an outer call of this one wins."""
    if _held.get() is not None:
        yield
        return
    token = _held.set(constants)
    try:
        yield
    finally:
        _held.reset(token)


def constant(values: Sequence[Any], *, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return ``torch.tensor(values, dtype=dtype, device=device)``; nobody may write to it."""
    known = _held.get()
    if known is None:
        return torch.tensor(values, dtype=dtype, device=device)
    # 0 == False == 0.0 as dictionary keys, and -0.0 == 0.0: spelt out, they are different constants.
    key = (repr(values), dtype, device)
    if key not in known:
        with _disable_current_modes():  # made before the capture, while the program is run for the first time
            known[key] = torch.tensor(values, dtype=dtype, device=device)
    return known[key]


def positions(steps: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return ``torch.tensor(steps, device=device)``, kept from call to call where it is short; nobody may write to it."""
    if _held.get() is not None or len(steps) > _KEPT:
        return constant(steps, device=device, dtype=torch.int64)
    return _positions(steps, device)


@functools.lru_cache(maxsize=256)
def _positions(steps: tuple[int, ...], device: torch.device) -> torch.Tensor:
    # Neither a mode's own kind of tensor nor one that autograd may not save.
    with _disable_current_modes(), torch.inference_mode(mode=False):
        return torch.tensor(steps, dtype=torch.int64, device=device)
