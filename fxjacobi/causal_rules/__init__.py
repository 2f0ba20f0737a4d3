"""The rules of the causal-rank analysis, one module for each family of operations."""

from fxjacobi.causal_rules import (
    convolution,
    indexing,
    matmul,
    normalisation,
    pointwise,
    reductions,
    softmax_attention,
    views,
)
from fxjacobi.causal_rules.domain import NOTHING, Abstract, Value, constant, unknown
from fxjacobi.causal_rules.registry import Context, find_rule

__all__ = [
    "NOTHING",
    "Abstract",
    "Context",
    "Value",
    "constant",
    "convolution",
    "find_rule",
    "indexing",
    "matmul",
    "normalisation",
    "pointwise",
    "reductions",
    "softmax_attention",
    "unknown",
    "views",
]
