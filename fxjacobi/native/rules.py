"""Which operations have a machine form: a rule writes what an operation of the body's graph computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from fxjacobi.rule_table import RuleTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxjacobi.native.values import Value

    Rule: TypeAlias = Callable[..., "Value | list[Value]"]
    """``rule(emitter, spec, *args, **kwargs)``: values in place of the node's tensors, and its spec (of the first of several)."""

    Together: TypeAlias = Callable[..., list[Value]]
    """``rule(emitter, spec, calls)``: a value for each of several calls ``(args, kwargs)``, of as many runs."""

__all__ = ["RULES", "TOGETHER", "Given"]

RULES: RuleTable[Rule] = RuleTable()

TOGETHER: RuleTable[Together] = RuleTable()
"""Operations whose calls in several runs share work."""

Given: TypeAlias = "Value | float | int | bool"
"""An argument where the operation takes a tensor or a number."""
