"""Finding sequences that grow and draws that depend on others: why a program that repeats has no loop."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from fxjacobi.graph import Site, TensorSpec, is_random, operation_of, site_of, spec_of

if TYPE_CHECKING:
    from torch import fx

__all__ = ["growing_sequence"]

aten = torch.ops.aten

_OFTEN = 4
"""Times that a sequence must grow to be taken for the reason."""


def growing_sequence(module: fx.GraphModule) -> str:
    """Return why the program repeats in no loop, if a sequence in it grows by a concatenation or is read in growing parts.

    ``x = cat([x, v], 1)`` and ``net(x[:, : t + 1])`` give every step other shapes, for which kernels may round otherwise:
    so the steps are not instances of one body. Neither are draws whose distribution is computed from earlier steps and
    whose noise cannot be drawn before (``poisson``, ``binomial``, gamma): an empty string if there is none of all these.
    """
    chain: dict[fx.Node, int] = {}
    parts: dict[tuple[Site | None, int], list[tuple[int, fx.Node]]] = defaultdict(list)
    longest: fx.Node | None = None
    draws: dict[tuple[Site | None, object], list[fx.Node]] = defaultdict(list)
    for node in module.graph.nodes:
        if is_random(node) and node.all_input_nodes:
            draws[site_of(node), node.target].append(node)
        spec = spec_of(node) if node.op == "call_function" else None
        if not isinstance(spec, TensorSpec):
            continue
        if node.target is aten.cat.default:
            joined = node.args[0]
            assert isinstance(joined, (list, tuple))
            chain[node] = 1 + max((chain.get(part, 0) for part in joined), default=0)
            if longest is None or chain[node] > chain[longest]:
                longest = node
        elif node.target is aten.slice.Tensor and site_of(node) is not None:
            dim = node.args[1] if len(node.args) > 1 else 0
            assert isinstance(dim, int)
            parts[site_of(node), dim].append((spec.shape[dim], node))
    if longest is not None and chain[longest] >= _OFTEN and longest.users:
        return _sentence("a sequence grows by a concatenation", longest, chain[longest])
    for sizes in parts.values():
        grown = sum(b[0] == a[0] + 1 for a, b in pairwise(sizes))
        if grown >= _OFTEN:
            return _sentence("a growing part of a sequence is read", sizes[0][1], grown)
    often = max(draws.values(), key=len, default=[])
    if len(often) >= _OFTEN:
        where = f" at {site_of(often[0])}" if site_of(often[0]) else ""
        return (
            f"{operation_of(often[0])}{where} draws from a distribution that is computed before it, {len(often)} times: "
            "its noise cannot be drawn first, so that the draws stay in order and there is no loop"
        )
    return ""


def _sentence(what: str, node: fx.Node, times: int) -> str:
    where = f" at {site_of(node)}" if site_of(node) else ""
    return (
        f"{what}{where}, {times} times, so that each step has other shapes and there is no loop; "
        "write into a tensor of the full length instead, and read all of it"
    )
