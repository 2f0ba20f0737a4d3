"""For each operation: whether it keeps the samples of a batch apart, where they lie in its result, and its sizes.

A rule is given a node of which at least one argument holds samples. It returns where they lie in the result, and the
arguments of the same operation on fewer samples: those that hold samples, the same part of others that are broadcast or
joined to them, and sizes in which the number of samples was. It raises :class:`NotPerSample` where samples mix or where
it does not know. The rules are in :mod:`fxjacobi.sample_moves` and :mod:`fxjacobi.sample_layers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch.fx.node import map_arg

from fxjacobi.causal_rules.pointwise import is_pointwise
from fxjacobi.causal_rules.reductions import argument
from fxjacobi.graph import TensorSpec, operation_of, site_of, spec_of
from fxjacobi.rule_table import RuleTable, overloads
from fxjacobi.sample_axis import NotPerSample, SampleAxis

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

__all__ = [
    "Axes", "Resized", "Rule", "Shrink", "aligned", "broadcast", "given", "mixes", "only", "rule_of", "sample_rule",
    "shape_of", "with_parts",
]  # fmt: skip

Axes: TypeAlias = "SampleAxis | tuple[SampleAxis | None, ...]"
"""Where samples lie in a result, or in each of several (``None``: it may not be read)."""

Resized: TypeAlias = "tuple[Axes, tuple[Any, ...], dict[str, Any]]"


class Shrink(Protocol):
    """What rules ask of the program that is being made smaller."""

    samples: int
    fewer: int

    def axis(self, node: fx.Node) -> SampleAxis | None:
        """Where samples lie in ``node``'s value; ``None`` where it does not depend on the array."""

    def operand(self, value: Any, wanted: SampleAxis | None) -> Any:
        """The smaller program's form of an argument, with the samples along ``wanted`` (``None``: it has none)."""

    def example(self, value: Any) -> Any:
        """``value`` with the Python values of the first step in place of nodes."""


Rule: TypeAlias = "Callable[[Shrink, fx.Node], Resized]"
_RULES: RuleTable[Rule] = RuleTable()
sample_rule = _RULES.register


def mixes(node: fx.Node, why: str = "mixes them") -> NotPerSample:
    """Return the refusal of ``node``, with the reason."""
    where = f" at {site_of(node)}" if site_of(node) else ""
    return NotPerSample(f"{operation_of(node)}{where} {why}")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of ``node``'s value."""
    spec = spec_of(node)
    if not isinstance(spec, TensorSpec):
        raise mixes(node, "has several results")
    return spec.shape


def given(node: fx.Node, name: str) -> Any:
    """Return an argument of ``node`` by its name in the schema."""
    return argument(node, name, node.args, node.kwargs)


def only(s: Shrink, node: fx.Node, position: int = 0) -> SampleAxis:
    """Return the axis of one argument, which must be the only one that holds samples."""
    axis = s.axis(node.args[position])  # type: ignore[arg-type]
    others = [n for n in node.all_input_nodes if n is not node.args[position] and s.axis(n) is not None]
    if axis is None or others:
        raise mixes(node, "takes them in a way that is not known to keep them apart")
    return axis


def with_parts(s: Shrink, node: fx.Node, axes: dict[int, SampleAxis | None]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments, those at the given positions along the given axes, and the others whole."""

    def whole(value: Any) -> Any:
        return map_arg(value, lambda n: s.operand(n, None))

    args = tuple(s.operand(a, axes[i]) if i in axes else whole(a) for i, a in enumerate(node.args))
    return args, whole(dict(node.kwargs))


def aligned(s: Shrink, node: fx.Node, axis: SampleAxis, shape: tuple[int, ...]) -> SampleAxis | None:
    """Return where ``node``, broadcast to ``shape``, has the samples of ``axis``; ``None`` where it has none."""
    if spec_of(node) is None:  # a Python value
        return None
    own = axis.moved(len(shape_of(node)) - len(shape))
    return None if own.dim < 0 or shape_of(node)[own.dim] == 1 < axis.length(s.samples) else own


def broadcast(s: Shrink, node: fx.Node, shape: tuple[int, ...], nodes: list[fx.Node]) -> SampleAxis:
    """Return the one axis that all of ``nodes``, broadcast to ``shape``, have where they hold samples."""
    found = {a.moved(len(shape) - len(shape_of(n))) for n in nodes if (a := s.axis(n)) is not None}
    if len(found) != 1:
        raise mixes(node)
    return found.pop()


_LIKE = frozenset(overloads("zeros_like", "ones_like", "full_like", "empty_like", "masked_fill", "where.self", "copy"))


def rule_of(node: fx.Node) -> Rule:
    """Return the rule for ``node``'s operation.

    Raises:
        NotPerSample: There is none.
    """
    found = _RULES.find(node.target)
    if found is not None:
        return found
    if is_pointwise(node.target) or node.target in _LIKE:
        return _pointwise
    raise mixes(node, "is not known to keep them apart")


def _pointwise(s: Shrink, node: fx.Node) -> Resized:
    shape = shape_of(node)
    axis = broadcast(s, node, shape, node.all_input_nodes)

    def place(one: fx.Node) -> Any:
        return s.operand(one, aligned(s, one, axis, shape))

    return axis, map_arg(node.args, place), map_arg(dict(node.kwargs), place)
