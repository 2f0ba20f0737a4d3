"""Limits of memory are the device's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fxjacobi.compiler import _within_device
from fxjacobi.device.limits import device_of_graph, spare_bytes
from fxjacobi.graph import TensorSpec
from fxjacobi.options import Options
from tests.unit.loop_makers import trace

if TYPE_CHECKING:
    import pytest

aten = torch.ops.aten
CUDA = torch.device("cuda", 1)


def test_plans_keep_within_what_the_device_has_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = trace(lambda x: (aten.neg.default(x),))
    for node in graph.graph.nodes:
        node.meta["spec"] = TensorSpec((2,), torch.float32, torch.device("cpu"), (1,))
    assert spare_bytes(device_of_graph(graph)) is None
    assert _within_device(Options(), graph).memory_limit is None
    node.prev.meta["spec"] = TensorSpec((2,), torch.float32, CUDA, (1,))
    asked: list[torch.device] = []

    def free(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 1000, 9000

    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 500)
    assert _within_device(Options(), graph).memory_limit == 600  # half of what is free or held unused
    assert asked == [CUDA]
    assert _within_device(Options(memory_limit=5), graph).memory_limit == 5
