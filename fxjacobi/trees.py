"""Taking nested arguments and results apart into tensors and a skeleton, and putting them together again.

``torch.utils._pytree`` treats dataclasses and unknown objects as leaves; a compiler that must return exactly what
the ordinary run returns has to look inside the former and refuse the latter when a tensor hides there.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import uuid
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Constant", "Node", "Skeleton", "Tensor", "join", "split", "without_values"]


@dataclass(frozen=True, slots=True)
class Tensor:
    """The ``index``-th tensor leaf; a tensor that occurs twice is one leaf."""

    index: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A leaf that is no tensor: values that cannot change are compared by type and value, anything else by identity."""

    value: Any

    def _key(self) -> tuple[Any, ...]:
        if isinstance(self.value, slice):  # without a hash before Python 3.12
            parts = (self.value.start, self.value.stop, self.value.step)
            return (slice, tuple([Constant(part)._key() for part in parts]))
        if isinstance(self.value, np.generic):
            return (type(self.value), self.value.tobytes())
        if isinstance(self.value, frozenset):
            return (frozenset, frozenset([Constant(item)._key() for item in self.value]))
        if isinstance(self.value, _VALUES):
            return (type(self.value), self.value)
        if isinstance(self.value, PRIMITIVES):
            # repr tells 0.0 from -0.0 and lets NaN equal NaN, which == does not.
            return (type(self.value), repr(self.value) if isinstance(self.value, (float, complex)) else self.value)
        return (type(self.value), id(self.value))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


@dataclass(frozen=True, slots=True)
class Node:
    """A container of type ``kind`` with its keys (empty for sequences) and children."""

    kind: type
    keys: tuple[Any, ...]
    children: tuple[Skeleton, ...]


Skeleton: TypeAlias = Tensor | Constant | Node

PRIMITIVES = (
    bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.Size, slice, range, type(Ellipsis),
)  # fmt: skip


_VALUES = (Fraction, Decimal, PurePath, dt.date, dt.timedelta, uuid.UUID)
"""Immutable values whose equality says all, within one type."""


def split(value: Any, *, opaque: Callable[[Any], None] | None = None) -> tuple[Skeleton, list[torch.Tensor]]:
    """Return ``value``'s skeleton and its tensors; ``opaque`` is called with each leaf that is no primitive."""
    splitter = _Splitter(opaque)
    return splitter.walk(value), splitter.tensors


class _Splitter:
    """The state of one :func:`split`. A closure that calls itself would keep the tensors alive until a collection."""

    def __init__(self, opaque: Callable[[Any], None] | None) -> None:
        self.tensors: list[torch.Tensor] = []
        self._seen: dict[int, int] = {}
        self._opaque = opaque

    def walk(self, item: Any) -> Skeleton:
        """Return the skeleton of ``item``, and append its tensors."""
        if isinstance(item, torch.Tensor):
            if id(item) not in self._seen:
                self._seen[id(item)] = len(self.tensors)
                self.tensors.append(item)
            return Tensor(self._seen[id(item)])
        kind = type(item)
        if isinstance(item, PRIMITIVES):
            return Constant(item)
        if kind in (tuple, list) or (isinstance(item, tuple) and hasattr(item, "_fields")):
            return Node(kind, (), tuple([self.walk(child) for child in item]))
        if kind in (dict, OrderedDict) or (kind is defaultdict and item.default_factory in _FACTORIES):
            kind = kind if kind is not defaultdict else _FACTORIES[item.default_factory]
            return Node(kind, tuple(item), tuple([self.walk(child) for child in item.values()]))
        if _is_plain_dataclass(item):
            names = tuple(field.name for field in dataclasses.fields(item) if hasattr(item, field.name))
            return Node(kind, names, tuple([self.walk(getattr(item, name)) for name in names]))
        if self._opaque is not None:
            self._opaque(item)
        return Constant(item)


class _WithFactory(dict[Any, Any]):
    """Stands for a defaultdict in a skeleton."""

    factory: Any = None


_FACTORIES: dict[Any, type[_WithFactory]] = {
    factory: type(f"_{factory}", (_WithFactory,), {"factory": factory})
    for factory in (None, list, dict, set, int, float, str, bool, tuple)
}


def _is_plain_dataclass(item: Any) -> bool:
    """Whether ``item`` is its fields, so that these make it again."""
    if not dataclasses.is_dataclass(item) or isinstance(item, (type, dict, nn.Module)):
        return False
    return getattr(item, "__dict__", {}).keys() <= {field.name for field in dataclasses.fields(item)}


def join(skeleton: Skeleton, tensors: Sequence[Any]) -> Any:
    """Rebuild the value that :func:`split` took apart, with ``tensors`` in place of its own."""
    if isinstance(skeleton, Tensor):
        return tensors[skeleton.index]
    if isinstance(skeleton, Constant):
        return skeleton.value
    children = [join(child, tensors) for child in skeleton.children]
    kind: Any = skeleton.kind
    if kind in (tuple, list):
        return kind(children)
    if hasattr(kind, "_fields"):
        return kind(*children)
    if issubclass(kind, dict):
        items = zip(skeleton.keys, children, strict=True)
        return defaultdict(kind.factory, items) if issubclass(kind, _WithFactory) else kind(items)
    result = object.__new__(kind)  # a dataclass: its __init__ and __post_init__ have run once and may not be pure
    for name, child in zip(skeleton.keys, children, strict=True):
        object.__setattr__(result, name, child)
    return result


def without_values(skeleton: Skeleton) -> Skeleton:
    """Return ``skeleton`` with the type of each constant in its place."""
    if isinstance(skeleton, Node):
        return Node(skeleton.kind, skeleton.keys, tuple([without_values(child) for child in skeleton.children]))
    return Constant(f"a {type(skeleton.value).__name__}") if isinstance(skeleton, Constant) else skeleton
