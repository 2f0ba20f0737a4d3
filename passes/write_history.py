"""What a slice of an array holds that is written position by position.

Each ``write(base, value, index)`` makes a version of its array. A read of version ``v`` at a region that pins some
dimension to one position can only see the writes at that position, and those that do not pin that dimension; these are
kept in lists, so that a chain of ``T`` writes each followed by a read takes time linear in ``T``.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import fx

    from fxjacobi.ops import Index

__all__ = ["FEW", "Region", "WriteHistory", "normalised"]

Entry: TypeAlias = int | tuple[int, int, int] | None
Region: TypeAlias = tuple[Entry, ...]
"""One entry for each dimension: a position, ``(start, stop, step)``, or ``None`` for all of it."""

FEW = 8
"""So many writes are compared with a read before it is left as it is; a short chain has no more."""


def normalised(index: Index, shape: tuple[int, ...]) -> Region | None:
    """``index`` with an entry for every dimension, positions from the front; ``None`` if it steps backwards."""
    region: list[Entry] = []
    for entry, size in zip((*index, *[None] * (len(shape) - len(index))), shape, strict=True):
        if isinstance(entry, int):
            region.append(entry % size if size else entry)
        elif entry is None:
            region.append(None)
        else:
            start, stop, step = slice(*entry).indices(size)
            if step < 1:
                return None
            region.append(None if (start, stop, step) == (0, size, 1) else (start, max(start, stop), step))
    return tuple(region)


class _Relation(Enum):
    WITHIN = "the read sees this write and nothing else"
    APART = "the read does not see this write"
    PARTLY = "the read may see this write and others"


def _relation(read: Region, written: Region) -> _Relation:
    within = True
    for r, w in zip(read, written, strict=True):
        if r == w or w is None:
            continue
        if isinstance(r, int):
            if isinstance(w, int) or not (w[0] <= r < w[1]) or (r - w[0]) % w[2]:
                return _Relation.APART
            continue
        within = False
        if r is None:
            continue
        low, high = (w, w + 1) if isinstance(w, int) else (w[0], w[1])
        if high <= r[0] or low >= r[1]:
            return _Relation.APART
        if isinstance(w, int) and (w - r[0]) % r[2]:
            return _Relation.APART
    return _Relation.WITHIN if within else _Relation.PARTLY


@dataclass(frozen=True, slots=True)
class _Write:
    node: fx.Node
    value: fx.Node
    region: Region


@dataclass(slots=True)
class _Chain:
    """The versions of one array: ``writes[v]`` makes version ``v + 1`` of version ``v``; version 0 is ``base``."""

    base: fx.Node
    short: bool
    writes: list[_Write] = field(default_factory=list)
    at: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    elsewhere: dict[int, list[int]] = field(default_factory=dict)

    def add(self, write: _Write) -> None:
        number = len(self.writes)
        self.writes.append(write)
        for dim, entry in enumerate(write.region):
            if isinstance(entry, int):
                self.at.setdefault((dim, entry), []).append(number)
            else:
                self.elsewhere.setdefault(dim, []).append(number)

    def seen_by(self, region: Region, version: int) -> Iterator[_Write]:
        """The writes that a read may see, newest first, and few others: each is the newest that the next dimension allows."""
        lists = [
            (self.at.get((dim, entry), []), self.elsewhere.get(dim, []))
            for dim, entry in enumerate(region)
            if isinstance(entry, int)
        ]
        while True:
            for first, second in lists:
                i, j = bisect.bisect_left(first, version), bisect.bisect_left(second, version)
                version = 1 + max(first[i - 1] if i else -1, second[j - 1] if j else -1)
                if not version:
                    return
            version -= 1
            yield self.writes[version]


class WriteHistory:
    """The write chains of a graph, and the slices taken of their versions."""

    def __init__(self) -> None:
        self._chains: dict[fx.Node, tuple[_Chain, int]] = {}
        self._parts: dict[fx.Node, tuple[fx.Node, Region]] = {}

    def write(self, node: fx.Node, base: fx.Node, value: fx.Node, region: Region, *, short: bool) -> None:
        """Note that ``node`` is ``base`` with ``value`` at ``region``; ``short``: few writes are made in all."""
        chain, version = self._chains.get(base, (None, 0))
        if chain is None or version != len(chain.writes):  # a version that was written to already begins a new array
            chain, version = _Chain(base, short), 0
        chain.add(_Write(node, value, region))
        self._chains[node] = chain, version + 1

    def part(
        self, source: fx.Node, rank: int, dim: int, entry: int | tuple[int, int, int]
    ) -> tuple[fx.Node, Region] | None:
        """The version and region that ``source`` at ``entry`` of its dimension ``dim`` is, if of a written array."""
        root: fx.Node
        region: Region
        if source in self._chains:
            root, region = source, (None,) * rank
        elif source in self._parts:
            root, region = self._parts[source]
        else:
            return None
        kept = [at for at, old in enumerate(region) if not isinstance(old, int)]
        old = region[kept[dim]]
        new: Entry = entry
        if isinstance(old, tuple):
            start, _, step = old
            if isinstance(entry, int):
                new = start + entry * step
            else:
                new = (start + entry[0] * step, start + entry[1] * step, step * entry[2])
        return root, (*region[: kept[dim]], new, *region[kept[dim] + 1 :])

    def note_part(self, node: fx.Node, root: fx.Node, region: Region) -> None:
        """Note that ``node`` is ``root`` at ``region``."""
        if root in self._chains:
            self._parts[node] = root, region

    def find(self, root: fx.Node, region: Region) -> tuple[fx.Node, Region | None]:
        """Where the value of ``root`` at ``region`` comes from.

        Returns the value of a write and what it was written to, if the read sees nothing else; or else the oldest
        version known to hold the same there, and ``None``.
        """
        chain, version = self._chains[root]
        if not any(isinstance(entry, int) for entry in region):
            # Without a pinned position only a few writes are looked at, and a long chain is not read past them: a loop
            # that writes on and on would have its first iterations read another version than the rest.
            for write in reversed(chain.writes[max(0, version - FEW) : version]):
                relation = _relation(region, write.region)
                if relation is _Relation.WITHIN:
                    return write.value, write.region
                if relation is _Relation.PARTLY:
                    return root, None
            return (chain.base if chain.short else root), None
        for tries, write in enumerate(chain.seen_by(region, version)):
            relation = _relation(region, write.region)
            if relation is _Relation.WITHIN:
                return write.value, write.region
            if relation is _Relation.PARTLY:
                return write.node, None
            if tries == FEW:
                return root, None
        return chain.base, None
