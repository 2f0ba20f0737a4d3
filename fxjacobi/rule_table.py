"""Rules by operation: one table for each analysis that goes through a graph node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["RuleTable", "overloads"]

R = TypeVar("R")


def overloads(*names: str) -> list[object]:
    """Return the ATen overloads of ``names`` that this build of PyTorch has (``"add"``: all of its overloads)."""
    found: list[object] = []
    for name in names:
        packet_name, _, overload = name.partition(".")
        packet = getattr(torch.ops.aten, packet_name, None)
        if packet is None:
            continue
        chosen = [overload] if overload else packet.overloads()
        found += [getattr(packet, one) for one in chosen if one in packet.overloads() and "out" not in one]
    return found


class RuleTable(Generic[R]):
    """Which rule handles which operation."""

    def __init__(self) -> None:
        self._rules: dict[object, R] = {}

    def register(self, *targets: object) -> Callable[[R], R]:
        """Register a rule for ATen names (``"add"``, ``"add.Tensor"``) or callables."""

        def into(rule: R) -> R:
            for target in targets:
                for one in overloads(target) if isinstance(target, str) else [target]:
                    self._rules[one] = rule
            return rule

        return into

    def find(self, target: object) -> R | None:
        """Return the rule of an operation, if it has one."""
        return self._rules.get(target)
