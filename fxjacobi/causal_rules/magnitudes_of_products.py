"""How large products, convolutions, attention and normalised values can be (:mod:`fxjacobi.causal_rules.magnitudes`)."""

from __future__ import annotations

from math import inf, isnan, sqrt
from typing import TYPE_CHECKING

import torch

from fxjacobi.attention_names import ATTENTION
from fxjacobi.causal_rules.interval import NORM_SLACK, Interval, Rests, symmetric
from fxjacobi.causal_rules.magnitudes import NORMALISATIONS, UNIT, Call, magnitude, name_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.causal_rules.domain import Abstract

__all__: list[str] = []

_LENIENCE = 1.25
"""How far above the exact bound a normalisation may come out in lenient intervals; the solver checks that."""


def _columns(call: Call, which: int, contracted: int) -> tuple[float, float, float, Rests] | None:
    """Return bounds of a matrix along its contracted dimension: ``||.||_2``, ``||.||_1``, and of all of it ``||.||_F``."""
    known: Abstract | None = call.known(which)
    if known is not None and known.value is not None:
        key = (id(known), contracted)
        if key not in call.context.norms:
            call.context.norms[key] = _norms(known.value.detach(), contracted)
        norms = call.context.norms[key]
        return None if isnan(norms[1]) else (*norms, Rests(known.sources))
    found = call.of(which)
    if found is None:
        return None
    length, size = call.shape(which)[contracted], found.size
    norm, total = found.rows(length) if contracted == -1 else (inf, inf)
    return min(norm, sqrt(length) * size), min(total, length * size), inf, found.rests


def _norms(value: torch.Tensor, contracted: int) -> tuple[float, float, float]:
    for dim in range(value.dim() - 2):
        value = value.narrow(dim, 0, 1) if value.stride(dim) == 0 else value  # one matrix for the whole batch
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    rows, totals = value.norm(dim=contracted), value.abs().sum(contracted)
    whole = rows.norm(dim=-1) if rows.dim() else rows
    return float(rows.max()) * NORM_SLACK, float(totals.max()) * NORM_SLACK, float(whole.max()) * NORM_SLACK


def _product(call: Call, left: int, right: int, contracted: int) -> Interval | None:
    """``|sum_k a_k b_k|``, by Cauchy and Schwarz or by Hölder, whichever is less; a row's norm by Frobenius."""
    first, second = call.of(left), call.of(right)
    columns = _columns(call, right, contracted)
    if first is None or second is None or columns is None:
        return None
    length = call.shape(left)[-1]
    norm, total = first.rows(length)
    size = min(norm * columns[0], first.size * columns[1], total * second.size)
    # The product with a vector has no rows of its own.
    whole = norm * columns[2] if len(call.shape(right)) > 1 else inf
    result = symmetric(size, first.rests | columns[3], whole)
    return None if result is None else result.rounded(call.dtype, max(2, length))


@magnitude("mm", "bmm", "matmul", "mv", "dot")
def _matmul(call: Call) -> Interval | None:
    """See :func:`_product`."""
    return _product(call, 0, 1, -2 if len(call.shape(1)) > 1 else -1)


@magnitude("linear")
def _linear(call: Call) -> Interval | None:
    """``|x W^T + b| <= |x W^T| + |b|``."""
    found = _product(call, 0, 1, -1)
    return found if found is None or call.get(2) is None else _plus(call, found, 2)


@magnitude("addmm", "baddbmm")
def _addmm(call: Call) -> Interval | None:
    """``|base + A B| <= |base| + |A B|``, element by element where the base is a mask."""
    if call.get("beta") != 1 or call.get("alpha") != 1:
        return None
    found = _product(call, 1, 2, -2)
    return None if found is None else _plus(call, found, 0)


def _plus(call: Call, product: Interval, which: int) -> Interval | None:
    """Add an argument that is broadcast to the result."""
    base = call.of(which)
    if base is None:
        return None
    rests = product.rests | base.rests
    both = Interval(product.low + base.low, product.high + base.high, product.norm + call.norm(which), rests=rests)
    return both.rounded(call.dtype)


@magnitude("convolution", "_convolution", "conv1d", "conv2d", "mkldnn_convolution")
def _convolution(call: Call) -> Interval | None:
    """``|y_o| <= ||w_o||_1 max|x| + |b_o|``."""
    found, weight = call.of(0), call.known(1)
    if found is None or weight is None or weight.value is None or call.get("transposed"):
        return None
    magnitudes = weight.value.detach().to(torch.float64).abs().flatten(1).sum(1)
    terms = weight.value[0].numel()
    result = symmetric(float(magnitudes.max()) * found.size, found.rests | Rests(weight.sources))
    if result is None:
        return None
    result = result.rounded(call.dtype, max(2, terms))
    if call.get(2) is None:
        return result
    bias = call.of(2)
    return None if bias is None else symmetric(result.size + bias.size, result.rests | bias.rests)


@magnitude(*ATTENTION)
def _attention(call: Call) -> Interval | None:
    """An average of values, whatever the weights."""
    found = call.of(2)
    if found is None or call.get("dropout_p"):
        return None
    result = symmetric(found.size, found.rests)
    return None if result is None else result.rounded(call.dtype, max(2, call.shape(2)[-2]))


@magnitude("native_layer_norm", "layer_norm", "native_group_norm", "group_norm", "rms_norm", "_fused_rms_norm")
def _normalised(call: Call) -> Interval | None:
    """``||.||_2 <= sqrt(N) max|gamma| + ||beta||_2``, and what rounding may add to it (see :func:`_normal`)."""
    name = str(name_of(call.node))
    if "group" in name:
        shape = call.shape(0)
        count = _numel(shape[1:]) // int(call.get("group" if name.startswith("native") else "num_groups"))
        epsilon = call.get("eps")
        rows = False
    else:
        normalized = call.get("normalized_shape")
        count = _numel(normalized)
        epsilon = call.get("eps")
        epsilon = torch.finfo(call.dtype).eps if epsilon is None else epsilon
        rows = len(normalized) == 1
    if not epsilon:
        return None
    gain, rests = 1.0, Rests()
    scale = call.get("weight")
    if scale is not None:
        interval = call.of("weight")
        if interval is None:
            return None
        gain, rests = interval.size, rests | interval.rests
    shift, shifts = 0.0, 0.0
    if "rms" not in name and call.get("bias") is not None:
        interval = call.of("bias")
        if interval is None:
            return None
        shift, shifts, rests = interval.size, interval.rows(count)[0], rests | interval.rests
    exact = gain * 1.01 * sqrt(count)
    if name not in NORMALISATIONS:
        size = exact
    elif call.context.lenient:
        size = _LENIENCE * exact
        limit = size + (shifts if rows else sqrt(call.shape(0)[-1]) * shift)
        rests |= Rests(assumed=frozenset({(call.node, limit)}))
        return symmetric(limit, rests, limit)
    else:
        found = call.of(0)
        if found is None or found.size == inf:
            return None
        size, rests = gain * _normal(count, found.size, epsilon), rests | found.rests
    result = symmetric(size + shift, rests, size + shifts if rows else inf)
    return None if result is None else result.rounded(call.dtype, 2)


def _normal(count: int, size: float, epsilon: float) -> float:
    """Bound ``||(x - mean) / sqrt(var + eps)||_2`` as it is computed for ``count`` elements of at most ``size``.

    The computed differences are off by at most ``d = (64 + N / 8) u X``. If the standard deviation is at least ``r d``,
    the computed one is at least ``1 - 3 / r`` of it, and the norm at most ``(1 + 1 / r) sqrt(N) / (1 - 3 / r)``; else the
    norm is at most ``sqrt(N) (r + 1) d / sqrt(eps)``. This holds for every r, so for the best.
    """
    error = (64 + count / 8) * UNIT * size
    bounds = []
    for ratio in (5.0, 10.0, 30.0, 100.0, 1000.0):
        usual = 1.01 * (1 + 1 / ratio) / (1 - 3 / ratio)
        bounds.append(max(usual, (ratio + 1) * error / sqrt(epsilon)))
    return sqrt(count) * min(bounds)


def _numel(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


@magnitude("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm")
def _batch_norm(call: Call) -> Interval | None:
    """``(x - mean) gamma / sqrt(var + eps) + beta`` with known statistics."""
    found = call.of(0)
    mean, variance = call.of("running_mean"), call.known("running_var")
    if found is None or mean is None or variance is None or variance.value is None or call.get("training"):
        return None
    gain, shift, rests = 1.0, 0.0, found.rests | mean.rests | Rests(variance.sources)
    for argument in ("weight", "bias"):
        if call.get(argument) is not None:
            interval = call.of(argument)
            if interval is None:
                return None
            rests |= interval.rests
            gain, shift = (interval.size, shift) if argument == "weight" else (gain, interval.size)
    smallest = float(variance.value.min()) + float(call.get("eps"))
    if smallest <= 0:
        return None
    result = symmetric((found.size + mean.size) * gain / sqrt(smallest) + shift, rests)
    return None if result is None else result.rounded(call.dtype, 2)
