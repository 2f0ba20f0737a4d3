"""Finite masks: scores with -1e9, -1e4 or the dtype's lowest number added to or put over them, instead of -inf.

    w = softmax(l)[i, j] = exp(l_ij - max_k l_ik) / sum      is exactly 0 if  l_ij < max_k l_ik - 104     (float32)

since ``exp(-104)`` is less than half the smallest subnormal. With intervals ``low <= l <= high`` of the logits
(:mod:`fxjacobi.causal_rules.magnitudes`) an entry vanishes, whatever the values are, if

    high_ij < max_k low_ik - 110                            (760 in float64, whose exponential reaches -746)

where 110 leaves room for the rounding of the difference. That a mask was *written* says nothing: -1e4 loses against a
score of 2e4. So scores have to be bounded, from the weights that make them and from a limit on the array and the
inputs, which is 2 ** 12 and which the solver checks at run time
(:attr:`fxjacobi.causality_proof.CausalityProof.limits`). It checks the limit on what the loop starts from and on every
iterate; and each array that the ordinary run gives to its network is put together from elements of those, so the
entries vanish there too, at every one of its steps.
Looking at the weights of the sweeps themselves would not show that: the ordinary run sees, behind the position that it
is about to write, what the array held before the loop, and no sweep sees that with the right prefix.

A layer norm bounds what follows whatever comes in, but for one thing: a row of nearly equal large elements may be
nothing but rounding, blown up by ``1 / sqrt(eps)``. Where the bounds that allow for it do not suffice (they grow from
layer to layer), normalisations are taken to be at most a quarter larger than in exact arithmetic. That too is a limit that the
solver checks at every sweep. What is not covered then: an ordinary run in which a row of the part that is not written
yet is rounded so badly at some step that its scores win against the mask, while no row of any sweep is.

A fused attention kernel shifts by a running maximum. Entries that a later block of keys outweighs are multiplied by
``exp(old - new) = 0`` when it comes, so they vanish all the same.
"""

from __future__ import annotations

import operator
from math import inf, sqrt
from typing import TYPE_CHECKING

import torch

from fxjacobi.causal_rules.domain import Abstract, some, squash
from fxjacobi.causal_rules.interval import LARGE, Interval
from fxjacobi.causal_rules.magnitudes import interval_of, name_of
from fxjacobi.emit import dense_stride
from fxjacobi.graph import TensorSpec, spec_of, stamp

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxjacobi.causal_rules.registry import Context

__all__ = ["LIMIT", "limit_flag", "vanishing_keys", "vanishing_logits"]

LIMIT = 4096.0
"""What elements of the array and of inputs are taken not to exceed, for the solver to check."""

aten = torch.ops.aten

_THROUGH = frozenset(["add", "sub", "mul", "div", "masked_fill", "where", "_to_copy", "clone", "movement", "maximum",
                      "clamp", "baddbmm", "addmm", "clamp_min"])  # fmt: skip


def _depth(dtype: torch.dtype) -> float:
    """How far below the row's largest logit the exponential is exactly zero."""
    return 760.0 if dtype == torch.float64 else 110.0


def _allowed(context: Context) -> bool:
    context.attends = context.attends or context.may_kill
    return context.may_kill and context.finite_masks and context.env is not None


def vanishing_logits(context: Context, node: torch.fx.Node, logits: object, dim: int) -> torch.Tensor | None:
    """Return where a softmax along ``dim`` has weight exactly 0 because of finite masks, squashed, or ``None``."""
    spec = spec_of(node)
    if not _allowed(context) or not isinstance(spec, TensorSpec):
        return None
    if not isinstance(logits, torch.fx.Node) or not _masked(context, logits):
        return None
    return _outweighed(context, node, spec, dim, lambda: interval_of(context, logits))


def vanishing_keys(
    context: Context, node: torch.fx.Node, query: object, key: object, mask: object, scale: float | None
) -> torch.Tensor | None:
    """Return where a fused attention's additive ``mask`` (..., L, S) outweighs every score, squashed, or ``None``.

    Scores are at most ``scale ||q||_2 ||k||_2``.
    """
    if not _allowed(context) or not isinstance(mask, torch.fx.Node):
        return None
    spec, query_spec = spec_of(mask), spec_of(query)  # type: ignore[arg-type]
    if not isinstance(spec, TensorSpec) or spec.dtype == torch.bool or not isinstance(query_spec, TensorSpec):
        return None
    if not _masked(context, mask):
        return None
    width, dtype = query_spec.shape[-1], query_spec.dtype

    def logits() -> Interval | None:
        added, queries, keys = interval_of(context, mask), interval_of(context, query), interval_of(context, key)
        if added is None or queries is None or keys is None:
            return None
        score = queries.rows(width)[0] * keys.rows(width)[0] * (1 / sqrt(width) if scale is None else abs(scale))
        around = torch.tensor(score, dtype=torch.float64)
        rests = added.rests | queries.rests | keys.rests
        return Interval(added.low - around, added.high + around, rests=rests).rounded(dtype, max(2, width))

    logits_spec = TensorSpec(spec.shape, dtype, spec.device, spec.stride)
    return _outweighed(context, node, logits_spec, -1, logits)


def _outweighed(
    context: Context, node: torch.fx.Node, spec: TensorSpec, dim: int, logits: Callable[[], Interval | None]
) -> torch.Tensor | None:
    """Return the entries that are outweighed whatever happens, else those that are unless a normalisation rounds badly."""
    note = "a finite mask is given, but no bound is known of the scores that it has to outweigh"
    for lenient in (False, True)[int(context.was_lenient) : 1 + context.may_be_lenient]:
        context.lenient = lenient
        try:
            found = logits()
        finally:
            context.lenient = False
        if found is None:
            continue
        low, high = (end.reshape(*[1] * (len(spec.shape) - end.dim()), *end.shape) for end in (found.low, found.high))
        dead = high < low.amax(dim, keepdim=True) - _depth(spec.dtype)
        if some(dead):
            context.reads |= found.rests.sources
            context.limits.update(found.rests.assumed)
            context.was_lenient = lenient
            return dead
        span = float(found.high.max()) - float(found.low.max())
        note = f"a finite mask is given, but it does not outweigh scores that may differ by {span:.3g}"
    context.notes[node] = note
    return None


def _masked(context: Context, node: torch.fx.Node) -> bool:
    """Whether a large finite constant is on the way to ``node``: only then is a bound worth its cost."""
    pending, seen = [node], {node}
    assert context.env is not None
    while pending:
        one = pending.pop()
        value = context.env.get(one)
        if isinstance(value, Abstract) and value.constant:
            assert value.value is not None
            if _large_and_finite(squash(value.value)):
                return True
            continue
        if one.op != "call_function" or name_of(one) not in _THROUGH:
            continue
        if any(isinstance(literal, (int, float)) and LARGE < abs(literal) < inf for literal in one.args):
            return True
        fresh = [used for used in one.all_input_nodes if used not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False


def _large_and_finite(value: torch.Tensor) -> bool:
    if not value.is_floating_point():
        return False
    size = value.abs()
    return some((size > LARGE) & (size < inf))


def limit_flag(graph: torch.fx.Graph, node: torch.fx.Node, limit: float) -> torch.fx.Node:
    """Append ``0 if max |node| <= limit else NaN`` to ``graph``; of all but placeholders, rows' norms are limited."""
    spec, rows = spec_of(node), node.op != "placeholder"
    if isinstance(spec, tuple):
        node = stamp(graph.call_function(operator.getitem, (node, 0)), spec[0])
        spec = spec[0]
    assert isinstance(spec, TensorSpec)
    scalar = TensorSpec((), spec.dtype, spec.device, ())
    size = node
    if rows:
        norms = TensorSpec(spec.shape[:-1], spec.dtype, spec.device, dense_stride(spec.shape[:-1]))
        size = stamp(graph.call_function(aten.linalg_vector_norm.default, (node, 2, [-1])), norms)
    elif spec.dtype != torch.bool:
        size = stamp(graph.call_function(aten.abs.default, (node,)), spec)
    most = stamp(graph.call_function(aten.amax.default, (size,)), scalar)
    flag = TensorSpec((), torch.bool, spec.device, ())
    within = stamp(graph.call_function(aten.le.Scalar, (most, limit)), flag)
    real = TensorSpec((), torch.float32, spec.device, ())
    zero = stamp(graph.call_function(aten.zeros_like.default, (within,), {"dtype": torch.float32}), real)
    return stamp(graph.call_function(aten.div.Tensor, (zero, within)), real)
