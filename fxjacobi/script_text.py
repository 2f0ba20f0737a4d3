"""The words of the TorchScript that :mod:`fxjacobi.script_writer` writes: constants, helpers, and which overloads are whose."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

__all__ = ["HELPERS", "OWN", "TENSOR_TO_SCALAR", "Bools", "Constant", "NotScriptableError", "overloads", "text"]


class NotScriptableError(Exception):
    """The graph holds something that TorchScript cannot express; the message says what."""


HELPERS = """
def fxjacobi_restride(value: Tensor, stride: List[int]) -> Tensor:
    part = value
    for dim in range(len(stride)):
        if stride[dim] == 0 and value.size(dim) > 1:
            part = part.narrow(dim, 0, 1)
    result = torch.empty_strided(part.shape, stride, dtype=value.dtype, device=value.device)
    return result.copy_(part).expand(value.shape)

def fxjacobi_copy(base: Tensor) -> Tensor:
    unit = max(1, 64 // base.element_size())
    phase = int(base.storage_offset()) % unit
    if phase == 0 or not base.is_contiguous():
        return base.clone()
    memory = torch.empty([phase + base.numel()], dtype=base.dtype, device=base.device)
    return memory[phase:].view(base.shape).copy_(base)
"""

OWN = frozenset(
    f"aten::{name}"
    for name in (
        "__range_length",
        "__derive_index",
        "__getitem__.t",
        "append.t",
        "eq.int",
        "add.int",
        "mul.int",
        "copy_",
    )
)
"""What the text around the graph's operations comes to."""

TENSOR_TO_SCALAR = {
    f"aten::{name}.Tensor": f"aten::{name}.Scalar"
    for name in ("add", "sub", "mul", "div", "rsub", "eq", "ne", "lt", "le", "gt", "ge", "remainder", "fmod",
                 "bitwise_and", "bitwise_or", "bitwise_xor", "floor_divide")
}  # fmt: skip
"""Overloads that Python calls with a number, which it wraps into a tensor, as the ``Scalar`` ones do in C++."""


class Bools:
    """A bool of the step, in the place of a node."""


class Constant:
    """A Python value in the place of a node."""

    def __init__(self, value: Any) -> None:
        self.value = value


def text(value: Any) -> str:
    """Return TorchScript source of a Python constant."""
    match value:
        case None | bool() | int():
            return repr(value)
        case float():
            return repr(value) if value == value and abs(value) != float("inf") else f"float('{value}')"
        case complex():
            raise NotScriptableError("a complex number")
        case str():
            return repr(value)
        case torch.dtype() | torch.memory_format() | torch.layout():
            return str(value)
        case torch.device():
            return f"torch.device('{value}')"
        case list() | tuple():
            return f"[{', '.join(text(v) for v in value)}]"
        case Constant():
            return text(value.value)
    raise NotScriptableError(f"a {type(value).__name__} is an argument")


def overloads(graph: Any) -> Counter[str]:
    """Count the overloads that a TorchScript graph calls, in its blocks too."""
    found: Counter[str] = Counter()
    for node in graph.nodes():
        if node.kind().startswith("aten::"):
            found[node.schema().split("(")[0]] += 1
        for block in node.blocks():
            found += overloads(block)
    return found
