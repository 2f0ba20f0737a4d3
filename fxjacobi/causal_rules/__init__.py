"""The rules of the causal-rank analysis, one module for each family of operations.

In the rules' docstrings ``r(x)[i]`` is the rank of element ``i``: the largest step whose written position it may depend on.
"""

from fxjacobi.causal_rules import (
    convolution,
    indexing,
    magnitudes_of_elements,
    magnitudes_of_products,
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
    "magnitudes_of_elements",
    "magnitudes_of_products",
    "matmul",
    "normalisation",
    "pointwise",
    "reductions",
    "softmax_attention",
    "unknown",
    "views",
]
