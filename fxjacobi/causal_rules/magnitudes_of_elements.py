"""How large the results of pointwise operations, views and reductions can be (:mod:`fxjacobi.causal_rules.magnitudes`)."""

from __future__ import annotations

from dataclasses import replace
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.causal_rules.domain import squash
from fxjacobi.causal_rules.interval import Interval, Rests, hull, symmetric
from fxjacobi.causal_rules.magnitudes import Call, magnitude, name_of, number
from fxjacobi.causal_rules.views import RESHAPES, VIEWS, reshaped
from fxjacobi.graph import TensorSpec, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__: list[str] = []


def _between(low: float, high: float) -> Callable[[Call], Interval]:
    return lambda _: Interval(torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64))


for _names, _low, _high in (
    (("sigmoid", "special_expit"), 0.0, 1.0), (("tanh", "erf", "sin", "cos", "sign"), -1.0, 1.0), (("hardsigmoid",), 0.0, 1.0),
    (("one_hot",), 0.0, 1.0),
):  # fmt: skip
    magnitude(*_names)(_between(_low, _high))


@magnitude("clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous", "_to_copy", "to", "dropout")
def _same(call: Call) -> Interval | None:
    """``|y| = |x|``, rounded to another dtype perhaps; dropout is bounded only where it does not train."""
    if call.node.target is torch.ops.aten.dropout.default and call.get(2):
        return None
    found = call.of(0)
    return None if found is None else found.rounded(call.dtype)


@magnitude(
    "relu", "silu", "gelu", "mish", "leaky_relu", "elu", "celu", "selu", "softplus", "hardswish", "relu6", "prelu"
)
def _activation(call: Call) -> Interval | None:
    """``|f(x)| <= 1.06 |x| + 1.76`` for each of them with its usual constants; a slope or alpha given counts too."""
    found = call.of(0)
    given = [float(one) for one in call.node.args[1:] if isinstance(one, (int, float))]
    if found is None or call.node.target is torch.ops.aten.prelu.default:
        return None
    if call.node.target is torch.ops.aten.relu.default:
        return Interval(found.low.clamp(min=0), found.high.clamp(min=0), found.norm, found.total, found.rests)
    most = max([1.06, *(abs(one) for one in given)])
    if name_of(call.node) in ("gelu", "silu", "mish", "hardswish"):
        return symmetric(1.01 * found.size, found.rests, 1.01 * found.norm, 1.01 * found.total)
    return symmetric(most * found.size + 1.76 * most, found.rests)


@magnitude("neg")
def _neg(call: Call) -> Interval | None:
    """``-high <= -x <= -low``."""
    found = call.of(0)
    return None if found is None else Interval(-found.high, -found.low, found.norm, found.total, found.rests)


@magnitude("abs")
def _abs(call: Call) -> Interval | None:
    """``|x| <= max(|low|, |high|)``."""
    found = call.of(0)
    return None if found is None else symmetric(found.size, found.rests, found.norm, found.total)


@magnitude("exp")
def _exp(call: Call) -> Interval | None:
    """``0 <= exp(x) <= exp(high)``."""
    found = call.of(0)
    if found is None or float(found.high.max()) > 700:
        return None
    return Interval(torch.zeros_like(found.high), found.high.exp(), rests=found.rests).rounded(call.dtype, 2)


@magnitude("sqrt", "square", "pow")
def _power(call: Call) -> Interval | None:
    """``|x^p| <= max|x|^p`` for the exponents that occur; even powers and roots are not negative."""
    found, name = call.of(0), name_of(call.node)
    exponent = {"sqrt": 0.5, "square": 2}.get(str(name), call.get(1) if name == "pow" else None)
    if found is None or exponent not in (0.5, 1, 2, 3, 4):
        return None
    high = torch.tensor(found.size, dtype=torch.float64) ** exponent
    low = torch.zeros_like(high) if exponent in (0.5, 2, 4) else -high
    return Interval(low, high, rests=found.rests).rounded(call.dtype, 2)


@magnitude("add", "sub", "rsub")
def _add(call: Call) -> Interval | None:
    """``low_a + low_b <= a + b <= high_a + high_b`` and ``||a + b|| <= ||a|| + ||b||``, with ``alpha`` on the second."""
    left, right, alpha = call.of(0), call.of(1), call.get("alpha")
    if left is None or right is None or not isinstance(alpha, (int, float)):
        return None
    name = str(name_of(call.node))
    if name == "rsub":
        left, right = right, left
    factor = -float(alpha) if name != "add" else float(alpha)
    if name == "rsub" and alpha != 1:
        return None
    low, high = right.low * factor, right.high * factor
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    found = _finite(left.low + low, left.high + high, left.rests | right.rests, call.dtype)
    if found is None or call.spec is None:
        return found
    return replace(found, norm=(call.norm(0) + abs(factor) * call.norm(1)) * 1.01)


def _finite(low: torch.Tensor, high: torch.Tensor, rests: Rests, dtype: torch.dtype) -> Interval | None:
    """Return the rounded interval unless infinities of opposite signs met in it."""
    if bool(low.isnan().any() | high.isnan().any()):
        return None
    return Interval(low, high, rests=rests).rounded(dtype)


@magnitude("mul", "div")
def _mul(call: Call) -> Interval | None:
    """The extremes of ``a b`` are among the products of the ends; ``a / b = a (1 / b)`` where b has one sign. RMS norm too."""
    left, right = call.of(0), call.of(1)
    if left is None or right is None or call.get("rounding_mode") is not None:
        return None
    for scaled, scale in ((call.get(0), call.get(1)), (call.get(1), call.get(0))):
        length = _root_mean_square(scaled, scale)
        if length is not None and name_of(call.node) == "mul":
            return symmetric(1.01 * sqrt(length), left.rests | right.rests, 1.01 * sqrt(length))
    if name_of(call.node) == "div":
        if bool((right.low <= 0).any() & (right.high >= 0).any()):
            return None
        right = Interval(1 / right.high, 1 / right.low, rests=right.rests)
    ends = [a * b for a in (left.low, left.high) for b in (right.low, right.high)]
    low, high = ends[0], ends[0]
    for end in ends[1:]:
        low, high = torch.minimum(low, end), torch.maximum(high, end)
    return _finite(low, high, left.rests | right.rests, call.dtype)


def _root_mean_square(node: object, scale: object) -> int | None:
    """Return N if ``scale`` is ``rsqrt(mean(node ** 2, -1) + eps)`` over N elements: RMS norm, written out."""
    if not isinstance(node, torch.fx.Node) or not isinstance(scale, torch.fx.Node) or name_of(scale) != "rsqrt":
        return None
    total = scale.args[0]
    if not isinstance(total, torch.fx.Node) or name_of(total) != "add" or not isinstance(total.args[1], float):
        return None
    mean = total.args[0]
    if total.args[1] <= 0 or not isinstance(mean, torch.fx.Node) or name_of(mean) != "mean" or len(mean.args) < 2:
        return None
    squares, spec = mean.args[0], spec_of(node)
    if mean.args[1] not in ([-1], (-1,)) or not isinstance(squares, torch.fx.Node) or not isinstance(spec, TensorSpec):
        return None
    square = (name_of(squares) == "pow" and squares.args == (node, 2)) or (
        name_of(squares) == "mul" and squares.args == (node, node)
    )
    return spec.shape[-1] if square and spec.dtype.is_floating_point else None


@magnitude("rsqrt")
def _rsqrt(call: Call) -> Interval | None:
    """``1 / sqrt(high) <= y <= 1 / sqrt(low)`` for positive values."""
    found = call.of(0)
    if found is None or float(found.low.min()) <= 0:
        return None
    return Interval(found.high.rsqrt(), found.low.rsqrt(), rests=found.rests).rounded(call.dtype, 2)


@magnitude("maximum", "minimum")
def _extreme(call: Call) -> Interval | None:
    """``max(low_a, low_b) <= max(a, b) <= max(high_a, high_b)``, and so for the minimum."""
    left, right = call.of(0), call.of(1)
    if left is None or right is None:
        return None
    pick = torch.maximum if name_of(call.node) == "maximum" else torch.minimum
    return Interval(pick(left.low, right.low), pick(left.high, right.high), rests=left.rests | right.rests)


@magnitude("clamp", "hardtanh", "clamp_min", "clamp_max")
def _clamp(call: Call) -> Interval | None:
    """Between the ends that are numbers, whatever came in."""
    names = ("min_val", "max_val") if name_of(call.node) == "hardtanh" else ("min", "max")
    ends = [call.get(name) for name in names]
    if any(end is not None and not isinstance(end, (int, float)) for end in ends):
        return None
    low, high = (-inf if ends[0] is None else float(ends[0])), (inf if ends[1] is None else float(ends[1]))
    found = call.of(0)
    if found is None:
        found = Interval(torch.tensor(-inf, dtype=torch.float64), torch.tensor(inf, dtype=torch.float64))
    found = Interval(found.low.clamp(low, high), found.high.clamp(low, high), rests=found.rests)
    return None if found.size == inf else found.rounded(call.dtype)


@magnitude("masked_fill", "where")
def _choose(call: Call) -> Interval | None:
    """Element by element where the choice is known, one interval for both sides where it is not."""
    first = name_of(call.node) == "masked_fill"
    choice, yes, no = (1, 2, 0) if first else (0, 1, 2)
    sides = call.of(yes), call.of(no)
    if sides[0] is None or sides[1] is None:
        return None
    known = call.known(choice)
    if known is None or known.value is None:
        return hull([sides[0], sides[1]]).rounded(call.dtype)
    mask = squash(known.value).cpu() != 0
    rests = sides[0].rests | sides[1].rests | Rests(known.sources)
    low, high = (torch.where(mask, a, b) for a, b in ((sides[0].low, sides[1].low), (sides[0].high, sides[1].high)))
    return Interval(low, high, rests=rests).rounded(call.dtype)


@magnitude("movement")
def _movement(call: Call) -> Interval | None:
    """A view: of one interval the same, of a mask the same view; rows that stay rows keep their norms."""
    found = call.of(0)
    if found is None or call.spec is None:
        return None
    spec = spec_of(call.node)
    if not isinstance(spec, TensorSpec):
        return found.one
    if found.low.dim() or found.high.dim():
        if any(isinstance(one, torch.fx.Node) for one in call.node.args[1:]):
            return found.one
        low, high = (_moved(call, end.expand(call.shape(0)), spec.shape) for end in (found.low, found.high))
        return Interval(low, high, rests=found.rests)
    if found.norm == inf and found.total == inf:
        return found
    times = _rows_in_a_row(call, spec.shape)
    return replace(found, norm=found.norm * sqrt(times), total=found.total * times)


def _rows_in_a_row(call: Call, shape: tuple[int, ...]) -> float:
    """Return how many rows of the argument a row of the view has elements of (at most), ``inf`` if that is not clear."""
    old = call.shape(0)
    if not old or not shape or 0 in old:
        return inf
    if call.node.target in RESHAPES:
        return 1 if old[-1] % shape[-1] == 0 else shape[-1] // old[-1] if shape[-1] % old[-1] == 0 else inf
    if any(isinstance(one, torch.fx.Node) for one in call.node.args[1:]):
        return inf
    # Elements that carry their place in the row: a row of the view steps through one row if it has a stride.
    move: Any = call.node.target
    view = move(torch.arange(old[-1]).expand(old), *call.node.args[1:], **call.node.kwargs)
    return 1 if shape[-1] == 1 or view.stride(-1) != 0 else inf


def _moved(call: Call, end: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    move: Any = call.node.target
    if move in RESHAPES:
        return squash(reshaped(end, shape))
    moved: torch.Tensor = move(end, *call.node.args[1:], **call.node.kwargs)
    return squash(moved)


@magnitude("getitem")
def _item(call: Call) -> Interval | None:
    """Of a split every part is like the whole; of other operations only the first result is bounded."""
    source = call.node.args[0]
    if call.get(1) == 0 or (isinstance(source, torch.fx.Node) and source.target in VIEWS):
        found = call.of(0)
        return found if found is None or call.get(1) == 0 else found.one
    return None


@magnitude("hull", "cat", "stack", "select_scatter", "slice_scatter", "index_put", "scatter")
def _hull(call: Call) -> Interval | None:
    """What is joined or written over is one of the parts."""
    nodes = list(call.get(0)) if isinstance(call.get(0), (list, tuple)) else list(call.node.args[:2])
    if name_of(call.node) == "index_put":
        if call.get(3):
            return None
        nodes = [call.get(0), call.get(2)]
    elif name_of(call.node) == "scatter":
        if call.get("reduce") is not None:
            return None
        nodes = [call.get(0), call.get(3)]
    parts = [call.interval(one) for one in nodes]
    return hull([part for part in parts if part is not None]) if all(part is not None for part in parts) else None


@magnitude("constant_pad_nd")
def _pad(call: Call) -> Interval | None:
    """What was there, or the border."""
    found, fill = call.of(0), number(call.get("value"))
    return None if found is None or fill is None else hull([found, fill])


@magnitude("index", "gather", "index_select", "flip", "roll", "repeat", "tile", "repeat_interleave", "take_along_dim", "amax",
       "amin", "max_pool1d", "max_pool2d", "max_pool2d_with_indices", "sort", "topk", "tril", "triu")  # fmt: skip
def _selection(call: Call) -> Interval | None:
    """Elements of the argument, or zeros outside a triangle."""
    found = call.of(0)
    if found is None:
        return None
    zero = torch.zeros((), dtype=torch.float64)
    return hull([found, Interval(zero, zero)]) if name_of(call.node) in ("tril", "triu") else found.one


@magnitude("embedding")
def _embedding(call: Call) -> Interval | None:
    """Rows of the table."""
    return call.of(0)


@magnitude("mean", "sum", "avg_pool1d", "avg_pool2d")
def _sum(call: Call) -> Interval | None:
    """``low <= mean <= high``; ``n min(low, 0) <= sum <= n max(high, 0)``."""
    found = call.of(0)
    if found is None or call.spec is None:
        return None
    count = 1
    for size in call.shape(0):
        count *= size
    times = count if name_of(call.node) == "sum" else 1
    ends = found.one
    low, high = (end.clamp(**{side: 0}) * times for end, side in ((ends.low, "max"), (ends.high, "min")))
    if name_of(call.node) == "mean":
        low, high = ends.low, ends.high
    return Interval(low, high, rests=found.rests).rounded(call.dtype, count)


@magnitude("_softmax", "softmax", "_safe_softmax")
def _softmax(call: Call) -> Interval:
    """``0 <= y <= 1``, and rows along the last dimension sum to 1."""
    last = call.get("dim") in (-1, len(call.shape(0)) - 1)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    total = 1.0 if last else inf
    return Interval(zero, one, total, total).rounded(call.dtype, max(2, call.shape(0)[call.get("dim")]))
