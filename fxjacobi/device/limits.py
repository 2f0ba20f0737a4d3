"""How much memory a device has to spare."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxjacobi.emit import tensors_of

if TYPE_CHECKING:
    from torch import fx

__all__ = ["device_of_graph", "spare_bytes"]

_SHARE = 0.5
"""Of the free memory, what solves may plan with: the rest is for fragments, captured graphs and other work."""


def device_of_graph(module: fx.GraphModule) -> torch.device:
    """Return where ``module`` computes: the first device beside the CPU that one of its nodes is on."""
    specs = (spec for node in module.graph.nodes for spec in tensors_of(node.meta.get("spec")))
    return next((spec.device for spec in specs if spec.device.type != "cpu"), torch.device("cpu"))


def spare_bytes(device: torch.device) -> int | None:
    """Return the bytes that solves on ``device`` may allocate; ``None`` for the CPU, where running out is found out.

    What the driver reports as free (``cudaMemGetInfo``) and what torch's allocator holds and does not use.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int((free + max(0, held)) * _SHARE)
