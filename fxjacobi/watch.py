"""What a recorded run read from Python: the values a specialisation is valid for.

A graph holds what the model's attributes, the globals, the closures, classes and modules *were*. A :class:`Watch`
remembers them (:mod:`fxjacobi.reachable` says which) and says, in well under a microsecond a place, whether they still
are. Tensors are compared by identity: their contents are read live, only rebinding one (``model.weight = other``), or
giving it another shape or dtype, invalidates a specialisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxjacobi.aliasing import storage_key
from fxjacobi.graph import TensorSpec, spec_of_value
from fxjacobi.mentioned import is_dynamic
from fxjacobi.placement import rounding_unit
from fxjacobi.reachable import MISSING, Code, Held, Place, Wrapper, held_by
from fxjacobi.trees import PRIMITIVES

if TYPE_CHECKING:
    import types
    from collections.abc import Hashable, Iterable, Mapping

__all__ = ["MISSING", "Change", "Watch", "Wrapper"]

_MOST_PLACES = 200_000
"""Of what the run can have read: with more it is refused."""

_MOST_AROUND = 20_000
"""Objects that are looked at although no code that is known mentions them: 0.2 s."""

# Not ``Tensor.data_ptr``, which a recording watches (fxjacobi.capture).
_data_ptr = torch._C.TensorBase.data_ptr


@dataclass(frozen=True, slots=True)
class Change:
    """A place that no longer holds what it held: ``container[key]`` was ``before`` and is ``after``."""

    name: str
    container: Any
    key: Any
    before: Any
    after: Any


class Watch:
    """Walks what is reachable from some roots once; see the module's docstring.

    Until :meth:`narrow` everything counts. From then on an attribute counts if its name is mentioned in code that the
    run reached: what a trainer keeps about its epochs is not the model's.

    Attributes:
        tensors: Storage key -> (qualified name, tensor) of every tensor reached.
        modules: The ``nn.Module`` instances reached.
        overflowed: Whether there was more than is watched.
    """

    def __init__(self) -> None:
        self.tensors: dict[int, tuple[str, torch.Tensor]] = {}
        self.modules: list[nn.Module] = []
        self.overflowed = False
        self._held: dict[int, tuple[Held, str]] = {}
        self._reached: dict[int, Any] = {}
        self._names: set[str] = set()
        self._closed: list[tuple[Any, str, str, bool]] = []
        self._around: list[tuple[Any, str]] = []
        self._count = 0
        self._specs: list[tuple[Any, Any, TensorSpec]] = []
        self._relaxed: set[tuple[int, Hashable]] = set()
        self._exact: list[Place] = []
        self._storages: list[tuple[torch.Tensor, int]] = []
        self._grads: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._used: list[tuple[torch.Tensor, int, int, torch.Size, tuple[int, ...], torch.dtype, bool | None]] = []
        self._seen: dict[int, Any] = {}
        self._codes: dict[tuple[types.CodeType, int], Code] = {}
        self._checks: _Checks | None = None
        self._narrowed = False

    # -- walking --------------------------------------------------------------------------------------------------

    def add(self, root: Any, name: str) -> None:
        """Walk everything reachable from ``root``."""
        self._checks = None
        self._walk([(root, name)])
        self._look_around()

    def add_code(self, code: types.CodeType, namespace: dict[str, Any]) -> None:
        """Watch the globals that ``code`` reads."""
        key = (code, id(namespace))
        if key not in self._codes:
            self.add(self._codes.setdefault(key, Code(code, namespace)), "")

    def _walk(self, stack: list[tuple[Any, str]]) -> None:
        """Go through gates that code reached so far opens, and take in what that code mentions."""
        while stack:
            value, path = stack.pop()
            if not isinstance(value, PRIMITIVES) and id(value) not in self._reached:
                held = self._look(value, path)
                self._reached[id(value)] = value
                self._count += len(held.places)
                if self._count > _MOST_PLACES:
                    self.overflowed = True
                    return
                self._names |= held.names
                for item, name, gate in held.links:
                    if self._open(gate, lazy=held.lazy):
                        stack.append((item, name))
                    else:
                        self._closed.append((item, name, gate or "", held.lazy))
                        self._around += [] if held.lazy else [(item, name)]
            if not stack:
                stack = self._opened()

    def _look_around(self) -> None:
        """Learn about the rest as well, as far as there is not too much of it: the run may change it unseen."""
        stack, self._around = self._around, []
        while stack and len(self._held) < _MOST_AROUND:
            value, path = stack.pop()
            if not isinstance(value, PRIMITIVES) and id(value) not in self._seen:
                held = self._look(value, path)
                if not held.lazy:
                    stack += [(item, name) for item, name, _ in held.links]

    def _look(self, value: Any, path: str) -> Held:
        known = self._held.get(id(value))
        if known is not None:
            return known[0]
        self._seen[id(value)] = value  # keeping it alive keeps its id its own
        if isinstance(value, torch.Tensor):
            if value.layout is torch.strided:
                key = storage_key(value)
                self.tensors.setdefault(key, (path, value))
                self._storages.append((value, key))
                if value.is_leaf:
                    self._grads.append((value, value.grad))
            held = Held()
        else:
            if isinstance(value, nn.Module) and not isinstance(value, Wrapper):
                self.modules.append(value)
            held = held_by(value, path)
            held.links = [(self._one(item), name, gate) for item, name, gate in held.links]
        self._held[id(value)] = held, path
        return held

    def _one(self, item: Any) -> Any:
        """Return the one object that stands for ``item``: functions of the same code share it."""
        return self._codes.setdefault((item.code, id(item.namespace)), item) if isinstance(item, Code) else item

    def _open(self, gate: str | None, *, lazy: bool) -> bool:
        return gate is None or gate in self._names or (not lazy and is_dynamic(self._names))

    def _opened(self) -> list[tuple[Any, str]]:
        """Return where the walk goes on because code reached since mentions the names."""
        found = [(item, name) for item, name, gate, lazy in self._closed if self._open(gate, lazy=lazy)]
        if found:
            self._closed = [each for each in self._closed if not self._open(each[2], lazy=each[3])]
        return found

    # -- checking -------------------------------------------------------------------------------------------------

    def narrow(self, used: Iterable[torch.Tensor], *, gradients: bool) -> None:
        """Watch from now on what the run can have read alone, and how the tensors that it ``used`` look."""
        self._narrowed, self._checks = True, None
        self._used = [
            (
                t,
                _data_ptr(t),
                rounding_unit(t.device),
                t.shape,
                t.stride(),
                t.dtype,
                t.requires_grad if gradients else None,
            )
            for t in used
            if t.layout is torch.strided
        ]

    def holds(self) -> bool:
        """Whether every place still holds what it held."""
        checks = self._checks
        if checks is None:
            checks = self._checks = self._collected()
        if not checks.hold():
            return False
        for container, key, spec in self._specs:
            try:
                value = container[key]
            except (KeyError, IndexError):
                return False
            if spec_of_value(value) != spec:
                return False
        for tensor, address, unit, shape, stride, dtype, gradients in self._used:
            if (
                tensor.shape != shape
                or tensor.stride() != stride
                or (gradients is not None and tensor.requires_grad != gradients)
            ):
                return False
            # Another type needs other memory; other memory of the same kind does as well, if it starts as this does.
            if _data_ptr(tensor) != address and (tensor.dtype != dtype or (_data_ptr(tensor) - address) % unit):
                return False
        return True

    def changes(self) -> list[Change]:
        """Every place that no longer holds what it held, and every key that is new in a watched dictionary or module."""
        found: list[Change] = []
        for value, (held, path) in self._known():
            found += [_change(p) for p in self._places(held) if not _same(p, _now(p))]
            if held.keys is not None:
                mapping, keys, name = held.keys
                found += [Change(f"{name}.{k}".removeprefix("."), mapping, k, MISSING, v)
                          for k, v in mapping.items() if k not in keys]  # fmt: skip
            if held.size:
                length = sum(isinstance(p.key, int) for p in held.places)
                if len(value) != length:
                    found.append(Change(f"the length of {path or 'a list'}", None, None, length, len(value)))
            for content in (held.content, held.settles):
                if content is not None and content[0]() != content[1]:
                    found.append(Change(path or f"a {type(value).__name__}", None, None, content[1], content[0]()))
        return [change for change in found if (id(change.container), change.key) not in self._relaxed]

    def used_up(self) -> str | None:
        """Name an iterator that the run may have read from: nobody can see where it stands."""
        return next(
            (path or type(value).__name__ for value, (held, path) in self._known(self._reached) if held.used_up), None
        )

    def replaced_storages(self) -> list[str]:
        """Names of tensors whose memory was exchanged (``p.data = ...``) or that got another ``.grad``."""
        names = [self.tensors[key][0] for tensor, key in self._storages if storage_key(tensor) != key]
        names += [f"{self.tensors[storage_key(t)][0]}.grad" for t, grad in self._grads if t.grad is not grad]
        return names

    def relax(self, container: Any, key: Any, spec: TensorSpec | None, after: Any) -> None:
        """From now on ``container[key]`` is state: only its spec (``None``: being exactly ``after``) must hold."""
        self._checks = None
        self._relaxed.add((id(container), key))
        if spec is not None:
            self._specs.append((container, key, spec))
        else:
            self._exact.append(Place(container, key, after, True, str(key)))

    def objects(self, *, mentioned: bool = False) -> list[Any]:
        """Return every object that was looked at, or those that code of the run can have ``mentioned``."""
        return list((self._reached if mentioned else self._seen).values())

    def knows(self, value: Any) -> bool:
        """Whether ``value`` itself was reached: it was there before the run."""
        return self._seen.get(id(value)) is value

    def count(self, value: Any) -> int:
        """In how many watched places ``value`` itself stands."""
        return sum(p.item is value for _, (held, _) in self._known() for p in self._places(held))

    def __len__(self) -> int:
        return sum(len(held.places) for held, _ in self._held.values())

    def _known(self, keys: Iterable[int] | None = None) -> list[tuple[Any, tuple[Held, str]]]:
        return [(self._seen[key], self._held[key]) for key in (self._held if keys is None else keys)]

    def _places(self, held: Held) -> list[Place]:
        """The places of a class or module that code mentions; all others' alike."""
        return [p for p in held.places if self._open(p.gate, lazy=True)] if held.lazy else held.places

    def _collected(self) -> _Checks:
        checks = _Checks(frozenset(self._names) if self._narrowed and not is_dynamic(self._names) else None)
        for value, (held, _) in self._known(self._reached if self._narrowed else None):
            gated = self._narrowed or held.lazy
            places = [p for p in held.places if not gated or self._open(p.gate, lazy=held.lazy)]
            checks.places += [
                (p.container, p.key, p.item, p.primitive)
                for p in places
                if (id(p.container), p.key) not in self._relaxed
            ]
            if held.size:
                checks.lengths.append((value, sum(isinstance(p.key, int) for p in held.places)))
            if held.keys is not None:
                checks.keys.append((held.keys[0], held.keys[1], held.gated))
            if held.content is not None:
                checks.contents.append(held.content)
        checks.places += [(p.container, p.key, p.item, p.primitive) for p in self._exact]
        return checks


class _Checks:
    """What is looked at before each call, laid out for speed.

    Args:
        names: Those by which an attribute that is new may be read; ``None``: any.
    """

    def __init__(self, names: frozenset[str] | None) -> None:
        self.names = names
        self.places: list[tuple[Any, Any, Any, bool]] = []
        self.lengths: list[tuple[Any, int]] = []
        self.keys: list[tuple[Mapping[Any, Any], frozenset[Any], bool]] = []
        self.contents: list[tuple[Any, Any]] = []

    def hold(self) -> bool:
        """Whether all are as they were."""
        for container, key, expected, primitive in self.places:
            try:
                value = container[key]
            except (KeyError, IndexError):
                return False
            if value is not expected and not (primitive and type(value) is type(expected) and value == expected):
                return False
        for container, length in self.lengths:
            if len(container) != length:
                return False
        for mapping, keys, gated in self.keys:
            if len(mapping) != len(keys) and not (gated and self.names is not None and self._unread(mapping, keys)):
                return False
        return all(read() == expected for read, expected in self.contents)

    def _unread(self, mapping: Mapping[Any, Any], keys: frozenset[Any]) -> bool:
        assert self.names is not None
        return self.names.isdisjoint(mapping.keys() ^ keys)


def _now(place: Place) -> Any:
    try:
        return place.container[place.key]
    except (KeyError, IndexError):
        return MISSING


def _same(place: Place, value: Any) -> bool:
    expected = place.item
    return value is expected or (place.primitive and type(value) is type(expected) and value == expected)


def _change(place: Place) -> Change:
    return Change(place.name.removeprefix("."), place.container, place.key, place.item, _now(place))
