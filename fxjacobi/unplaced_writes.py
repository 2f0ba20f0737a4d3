"""Loops that fill an array in a way that is not seen to be one: why they stay in order.

x = where(m_t, v, x)    x = x * (1 - m_t) + v * m_t    x = index_copy(x, 1, i_t, v)    x = cat([x[:, 1:], v], 1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi.causal_rules.views import VIEWS
from fxjacobi.equations import body_outputs, resting_on
from fxjacobi.graph import TensorSpec, operation_of, site_of, spec_of
from fxjacobi.loops import Carried
from fxjacobi.rule_table import overloads

if TYPE_CHECKING:
    from fxjacobi.loops import Loop

__all__ = ["unplaced_write"]

aten = torch.ops.aten

_PLACED = frozenset(
    overloads(
        "index_copy", "index_fill.int_Scalar", "index_fill.int_Tensor", "index_put", "_unsafe_index_put", "scatter.src",
        "scatter.value", "put",
    )
)  # fmt: skip
_MASKED = frozenset(overloads("where.self", "masked_fill.Scalar", "masked_fill.Tensor", "masked_scatter"))
_JOINED = frozenset(overloads("cat", "roll"))

_MIXES = frozenset(overloads("mm", "mv", "addmm", "addmv", "bmm", "baddbmm", "convolution", "dot", "linear"))


def unplaced_write(loop: Loop) -> str:
    """Return what puts new values into what ``loop`` carries, and why its places are not known; empty where nothing does."""
    outputs = body_outputs(loop.body)
    for carried, binding in zip(loop.body.graph.find_nodes(op="placeholder"), loop.bindings, strict=True):
        if not isinstance(binding, Carried) or not isinstance(spec_of(carried), TensorSpec):
            continue
        made: Any = outputs[binding.output]
        while isinstance(made, fx.Node) and made.target in VIEWS:
            made = made.args[0]
        if not isinstance(made, fx.Node) or made.op != "call_function" or not _reads(made, carried):
            continue
        why = _why(made, carried)
        if why:
            where = f" at {site_of(made)}" if site_of(made) else ""
            return f"{operation_of(made)}{where} {why}"
    return ""


def _reads(node: fx.Node, carried: fx.Node) -> bool:
    return carried in resting_on([node])


def _why(made: fx.Node, carried: fx.Node) -> str:
    if made.target in _PLACED:
        return "writes to places that are not known before the loop starts; write x[:, t] = v with a number t"
    if made.target in _MASKED:
        return "writes through a mask that is not known before the loop starts; write x[:, t] = v with a number t"
    if made.target in _JOINED:
        return "moves what is carried to other places; write x[:, t] = v into an array that stays where it is"
    if made.target is aten.add.Tensor and any(
        one.target in _MIXES and _reads(one, carried) for one in made.graph.nodes
    ):
        for part in made.all_input_nodes:
            others = [used for used in part.all_input_nodes if used is not carried]
            kept = part.target is aten.mul.Tensor or part.target in _MASKED
            if kept and carried in part.all_input_nodes and not any(_reads(other, carried) for other in others):
                return "blends old and new values, so that all may change; where only some do, write x[:, t] = v"
    return ""
