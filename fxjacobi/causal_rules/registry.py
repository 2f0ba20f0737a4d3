"""Which rule handles which operation, and what rules report while they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from fxjacobi.causal_rules.domain import Abstract, Value, squash, unknown
from fxjacobi.graph import Spec, TensorSpec, spec_of
from fxjacobi.rule_table import RuleTable

if TYPE_CHECKING:
    import torch
    from torch import fx

    from fxjacobi.causal_rules.interval import Interval

__all__ = ["Context", "Rule", "fill", "find_rule", "first_of", "rule", "tensors_in"]


@dataclass
class Context:
    """What one analysis has found so far, written by the rules.

    Args:
        top: Rank of an element that may depend on everything (``T - 1``).
        may_kill: Whether an absorbing constant (``0 * x``) may remove a dependence here; false inside inner loops,
            where the solver cannot check at run time that ``x`` was finite.
        finite_masks: Whether bounds may show that finite attention masks exclude; if not, ``attends`` is set where they
            might have been tried.
        may_be_lenient: Whether those bounds may rest on how large normalisations are found to be at run time.
        attends: Whether a softmax or a fused attention was met.
        assumable: Placeholders whose elements may be taken to be no larger than a limit.
        kills: Nodes at which an absorbing constant removed a dependence.
        reads: Names of the constants that the outcome rests on.
        limits: The limits that the outcome rests on: of a placeholder's elements, of the norms of another node's rows.
        notes: What stood in the way of a better outcome, by node.
        unknown_ops: Operations without a rule.
        env: The values of the graph that is being interpreted.
        intervals: What is known so far of how large its values are.
        norms: Norms of weights, by the weight's identity and the dimension along which they were taken.
        was_lenient: Whether the outcome rests on a lenient bound already, so that no other need be tried.
        lenient: Whether normalisations are taken to be as large as in exact arithmetic, for the solver to check.
    """

    top: int
    may_kill: bool = True
    finite_masks: bool = True
    may_be_lenient: bool = True
    attends: bool = False
    assumable: Mapping[fx.Node, float] = field(default_factory=dict)
    kills: set[fx.Node] = field(default_factory=set)
    reads: set[str] = field(default_factory=set)
    limits: dict[fx.Node, float] = field(default_factory=dict)
    notes: dict[fx.Node, str] = field(default_factory=dict)
    unknown_ops: dict[fx.Node, str] = field(default_factory=dict)
    env: Mapping[fx.Node, Value] | None = None
    intervals: dict[tuple[fx.Node, bool], Interval | None] = field(default_factory=dict)
    norms: dict[tuple[int, int], tuple[float, float, float]] = field(default_factory=dict)
    was_lenient: bool = False
    lenient: bool = False

    @contextmanager
    def within(self, env: Mapping[fx.Node, Value]) -> Iterator[None]:
        """Interpret another graph, whose values are ``env``, for a while."""
        outer = self.env, self.intervals, self.norms
        self.env, self.intervals, self.norms = env, {}, {}
        try:
            yield
        finally:
            self.env, self.intervals, self.norms = outer

    def read(self, *values: Abstract) -> None:
        """Record that the outcome rests on the constants behind ``values``."""
        for value in values:
            self.reads |= value.sources

    def kill(self, node: fx.Node, *values: Abstract) -> None:
        """Record that ``node`` removed a dependence by an absorbing constant: NaN there voids the proof's premise."""
        self.kills.add(node)
        self.read(*values)

    def give_up(self, node: fx.Node, args: object, kwargs: object) -> Value:
        """Return the conservative value of ``node`` and name its operation.

        Without an argument that depends on a written position the outcome depends on none either; with one, every
        element may depend on everything.
        """
        touched = any(tensor.highest >= 0 for tensor in tensors_in((args, kwargs)))
        if touched:
            self.unknown_ops.setdefault(node, str(node.target))
        return fill(spec_of(node), self.top if touched else -1)


def fill(spec: Spec, rank: int) -> Value:
    """Return a value of ``spec``'s structure with one rank everywhere."""
    if isinstance(spec, TensorSpec):
        return unknown(spec.shape, rank)
    if isinstance(spec, tuple):
        return tuple(fill(item, rank) for item in spec)
    return None


def first_of(spec: Spec, rank: torch.Tensor) -> Value:
    """Return a value of ``spec``'s structure: its first result has these ranks, others (statistics) the highest of them."""
    if isinstance(spec, TensorSpec):
        return Abstract(rank.expand(spec.shape))
    assert isinstance(spec, tuple)
    highest = squash(rank).amax()
    rest = [Abstract(highest.expand(one.shape)) if isinstance(one, TensorSpec) else None for one in spec[1:]]
    return (first_of(spec[0], rank), *rest)


Rule: TypeAlias = Callable[[Context, "fx.Node", tuple[Any, ...], dict[str, Any]], Value]
"""``rule(context, node, args, kwargs)`` with abstract values in place of tensors."""

_RULES: RuleTable[Rule] = RuleTable()
rule, find_rule = _RULES.register, _RULES.find


def tensors_in(value: object) -> list[Abstract]:
    """Return the abstract tensors in nested tuples, lists and dicts."""
    if isinstance(value, Abstract):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return []
