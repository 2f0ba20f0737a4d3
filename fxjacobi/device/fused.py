"""A body as fused kernels: torch's Inductor, for results within a tolerance."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.device.norms import agreement
from fxjacobi.device.runner import Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import fx

__all__ = ["FUSING_S", "fused"]

_log = logging.getLogger(__name__)

FUSING_S = 20.0
"""The budget for measuring from which on fused kernels are a candidate: compiling them takes seconds to a minute."""


def fused(graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Sequence[Any]] | Refused:
    """Return ``graph`` compiled by Inductor for arguments like ``examples``, or why it is not.

    Fused kernels round otherwise than the operations one by one, so they serve a tolerance only, and only where they
    agree with the graph up to another order of rounding on the examples. Matrix products stay those of the libraries;
    no CUDA graphs of Inductor's own are made, for the whole sweep is captured.
    """
    if not all(isinstance(value, torch.Tensor) for value in examples):
        return Refused("its arguments are not all tensors")
    from torch import _inductor  # imports a second's worth of torch

    # What the compiler raises is its own (a missing compiler, an operation it does not lower): one candidate less.
    try:
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            compiled: Callable[..., Sequence[Any]] = _inductor.compile(
                graph, list(examples), options={"triton.cudagraphs": False}
            )
            found, wanted = compiled(*examples), graph(*examples)
    except Exception as error:  # noqa: BLE001 - see above
        _log.info("not fused", exc_info=True)
        return Refused(f"Inductor does not compile it: {type(error).__name__}")
    pairs = [(f, w) for f, w in zip(found, wanted, strict=True) if isinstance(w, torch.Tensor)]
    if any(f.shape != w.shape or f.dtype != w.dtype for f, w in pairs):
        return Refused("its fused kernels give other shapes")
    if not bool(agreement([w for _, w in pairs], [f for f, _ in pairs])):
        return Refused("its fused kernels are off by more than rounding")
    return compiled
