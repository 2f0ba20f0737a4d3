"""What Python objects hold that a run may read: the places to watch, and where a walk goes on from each.

A place in an object's attributes, in a class or in a module has a *gate*, the attribute's name: only code that mentions
the name can read the place. Places that libraries read by themselves (``forward``, ``training``, all of a subclass of a
library's class) have none.
"""

from __future__ import annotations

import array
import collections
import contextvars
import functools
import io
import re
import sys
import threading
import types
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol

import numpy as np
from torch import nn

from fxjacobi.mentioned import globals_read, mentioned, with_nested
from fxjacobi.trees import PRIMITIVES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["MISSING", "Code", "Held", "Place", "Wrapper", "held_by"]

_LIBRARIES = (
    frozenset({"torch", "numpy", "builtins", "typing", "typing_extensions", "fxjacobi"}) | sys.stdlib_module_names
)
_OUTSIDE = frozenset({"logging", "asyncio", "concurrent", "multiprocessing", "socket", "subprocess", "_pytest"})
"""Libraries whose objects lead to all of a program, and hold nothing that a model computes with."""

_OWN_RULES = (object, nn.Module, Generic, Protocol)
"""Bases whose own attributes are known: what a subclass adds is read by its own code alone."""

_MODULE_INTERNALS = frozenset(
    {
        "_non_persistent_buffers_set", "_is_full_backward_hook", "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    }
)  # fmt: skip
_MODULE_FIELDS = frozenset(vars(nn.Module()))
_CALLED = frozenset({"forward", "_call_impl", "_wrapped_call_impl"})
_MAKING = ("__new__", "__init__", "__post_init__")
_NOT_CALLED = frozenset(
    {
        *_MAKING, "__repr__", "__str__", "__del__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__",
        "__copy__", "__deepcopy__", "__init_subclass__", "__class_getitem__", "__sizeof__", "__dir__",
    }
)  # fmt: skip
"""Methods that nothing calls but code that mentions them, or makes an object of the class."""
_INSIDE = re.compile(r"\._(parameters|buffers|modules)\.")


class Wrapper:
    """A callable that keeps books about its calls: a run depends on what it wraps, not on its books.

    It may well be reached by the run that it wraps, as in ``self.fast = fxjacobi.compile(self.loop)``.
    """

    _original: Any

    def wrapped(self) -> Any:
        """What a recorded run calls in its place."""
        return self._original


class _Missing:
    def __repr__(self) -> str:
        return "<missing>"


MISSING = _Missing()


@dataclass(frozen=True, slots=True)
class Place:
    """``container[key]``, which holds ``item``; ``primitive`` values are compared, others are the same object or not."""

    container: Any
    key: Any
    item: Any
    primitive: bool
    name: str
    gate: str | None = None


@dataclass(slots=True)
class Held:
    """What one object holds.

    Attributes:
        places: What is compared item by item.
        links: Where a walk goes on: object, its name, and its gate.
        keys: A mapping that may get further keys, and those it has.
        gated: Whether such keys have gates.
        size: Whether the length of the object counts.
        content: What is compared as a whole: how to read it, and what it is.
        settles: Like ``content``, but only a change during the run counts.
        names: What code mentions.
        used_up: Whether reading the object changes it, where nobody can see.
        lazy: Whether a walk goes on, and places count, where a gate is open only: all of a class or of a module.
    """

    places: list[Place] = field(default_factory=list)
    links: list[tuple[Any, str, str | None]] = field(default_factory=list)
    keys: tuple[Mapping[Any, Any], frozenset[Any], str] | None = None
    gated: bool = False
    size: bool = False
    content: tuple[Callable[[], Any], Any] | None = None
    settles: tuple[Callable[[], Any], Any] | None = None
    names: frozenset[str] = frozenset()
    used_up: bool = False
    lazy: bool = False

    def add(self, container: Any, fields: Mapping[Any, Any], path: str, gate: Callable[[Any], str | None]) -> None:
        """Add the places ``container[key]`` for the keys of ``fields``."""
        for key, item in fields.items():
            primitive = isinstance(item, PRIMITIVES)
            # Never the text of a key that is an object: a tensor's would read its memory.
            name = f"{path}.{key if isinstance(key, (str, int)) else type(key).__name__}" if key is not None else path
            self.places.append(Place(container, key, item, primitive, name, gate(key)))
            if not primitive:
                self.links.append((_inside(item), _INSIDE.sub(".", name), gate(key)))


@dataclass(frozen=True)
class Code:
    """Code and the globals that it reads."""

    code: types.CodeType
    namespace: dict[str, Any] = field(hash=False, compare=False)


def _is_library(name: str | None) -> bool:
    """Whether a module of this name changes only with an upgrade."""
    return (name or "").partition(".")[0] in _LIBRARIES


def held_by(value: Any, path: str) -> Held:
    """Return what ``value``, known as ``path``, holds. Tensors hold nothing: their contents are read live."""
    for kinds, rule in _RULES:
        if isinstance(value, kinds):
            return rule(value, path)
    return _object(value, path)


# -- containers -------------------------------------------------------------------------------------------------------


def _ungated(_: Any) -> None:
    return None


def _dict(value: dict[Any, Any], path: str) -> Held:
    held = Held(keys=(value, frozenset(value), path))
    held.add(value, value, path, _ungated)
    return held


def _list(value: list[Any], path: str) -> Held:
    held = Held(size=True)
    held.add(value, dict(enumerate(value)), path, _ungated)
    return held


def _items(value: Any, path: str) -> Held:
    held = Held(links=[(item, f"{path}.{i}", None) for i, item in enumerate(value)])
    if isinstance(value, (set, collections.deque)):
        kind: Any = frozenset if isinstance(value, set) else tuple
        held.content = _read(lambda: kind(map(_compared, value)))
    return held


def _bytes(value: Any, path: str) -> Held:  # noqa: ARG001 - one signature for all rules
    if isinstance(value, np.ndarray):
        return Held(content=_read(lambda: (value.shape, value.dtype.str, value.tobytes())))
    return Held(content=_read(lambda: bytes(value)))


def _variable(value: contextvars.ContextVar[Any], path: str) -> Held:
    return Held(content=_read(lambda: _compared(value.get(None))), links=[(value.get(None), path, None)])


def _read(read: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    return read, read()


def _compared(item: Any) -> Any:
    return (type(item), item) if isinstance(item, PRIMITIVES) else id(item)


# -- code -------------------------------------------------------------------------------------------------------------


def _method(value: types.MethodType, path: str) -> Held:
    return Held(links=[(value.__self__, path, None), (value.__func__, path, None)])


def _partial(value: functools.partial[Any], path: str) -> Held:
    return Held(links=[(value.func, path, None), (value.args, path, None), (value.keywords, path, None)])


def _function(function: types.FunctionType, path: str) -> Held:
    if _is_library(function.__module__):
        return Held()
    held = Held(links=[(function.__defaults__, path, None), (function.__kwdefaults__, path, None)])
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with_name = f"{path}.{name}" if path else name
        held.add(_Cell(cell), {None: _Cell(cell)[None]}, with_name, _ungated)
    held.links.append((Code(function.__code__, function.__globals__), "", None))
    return held


def _code(value: Code, path: str) -> Held:  # noqa: ARG001 - one signature for all rules
    namespace, found = value.namespace, Held(names=mentioned(value.code))
    for each in with_nested(value.code):
        fields = {n: namespace[n] for n in globals_read(each) if n in namespace and not n.startswith("__")}
        kept = {n: v for n, v in fields.items() if not isinstance(v, types.BuiltinFunctionType)}
        found.add(namespace, kept, "", _ungated)
    places, found.places = found.places, []
    # Names of modules and classes are not rebound by those who mean to change what a model does; what they hold may be.
    found.places = [p for p in places if not isinstance(p.item, (types.ModuleType, type))]
    found.links = [(item, name.removeprefix("."), gate) for item, name, gate in found.links]
    classes = [item for item, _, _ in found.links if isinstance(item, type) and not _is_library(item.__module__)]
    found.links += [(_inside(getattr(c, name, None)), c.__name__, None) for c in classes for name in _MAKING]
    return found


def _wrapper(value: Wrapper, path: str) -> Held:
    return Held(links=[(value.wrapped(), path, None)])


def _module(value: types.ModuleType, path: str) -> Held:
    held = Held(lazy=True)
    if not _is_library(value.__name__):
        fields = {k: v for k, v in vars(value).items() if not k.startswith("__")}
        held.add(vars(value), fields, path, str)
    return held


def _class(value: type, path: str) -> Held:
    held = Held(lazy=True)
    if _is_library(value.__module__):
        return held
    gate = _gates_of_class(value)
    fields = {k: v for k, v in vars(value).items() if not k.startswith("__") or callable(v)}
    held.add(vars(value), {k: v for k, v in fields.items() if k != "__class__"}, path, gate)
    held.links += [(base, path, None) for base in value.__bases__ if base is not object]
    return held


def _inside(item: Any) -> Any:
    if isinstance(item, (staticmethod, classmethod)):
        return item.__func__
    return (item.fget, item.fset) if isinstance(item, property) else item


# -- objects ----------------------------------------------------------------------------------------------------------


def _torch_module(value: nn.Module, path: str) -> Held:
    fields = {k: v for k, v in value.__dict__.items() if k not in _MODULE_INTERNALS}
    return _attributes(value, value.__dict__, fields, path)


def _object(value: Any, path: str) -> Held:
    kind = type(value)
    if kind.__module__.partition(".")[0] in _OUTSIDE or kind is threading.Thread:
        return Held()
    fields: Any = getattr(value, "__dict__", None)
    if isinstance(fields, dict) and not kind.__module__.startswith("torch._"):
        held = _attributes(value, fields, fields, path)
    else:
        held = Held() if _is_library(kind.__module__) else Held(links=[(kind, path, None)])
        # An iterator of Python's own: where it stands shows nowhere.
        held.used_up = hasattr(kind, "__next__") and not isinstance(value, io.IOBase) and _is_library(kind.__module__)
    if not _is_library(kind.__module__):
        slots = _Slots(value)
        held.add(slots, {name: slots[name] for name in _slots_of(kind)}, path, _gates_of(kind))  # type: ignore[arg-type] # a class is hashable
    if isinstance(value, functools._lru_cache_wrapper):
        held.settles = _read(lambda: value.cache_info().misses)
    return held


def _attributes(value: Any, container: dict[str, Any], fields: dict[str, Any], path: str) -> Held:
    kind = type(value)
    gate = _gates_of(kind)  # type: ignore[arg-type] # a class is hashable
    held = Held(keys=(container, frozenset(container), path), gated=gate is not _ungated)
    held.add(container, fields, path, gate)
    if not _is_library(kind.__module__):
        held.links.append((kind, path, None))
    return held


@functools.cache
def _gates_of(kind: type) -> Callable[[Any], str | None]:
    """Return the gate of each attribute of an instance."""
    libraries = [b for b in kind.__mro__ if _is_library(b.__module__) and b not in _OWN_RULES]
    if libraries:
        return _ungated
    known = _MODULE_FIELDS if issubclass(kind, nn.Module) else frozenset[str]()
    return lambda key: None if not isinstance(key, str) or key in known or key.startswith("__") else key


@functools.cache
def _gates_of_class(kind: type) -> Callable[[Any], str | None]:
    """Return the gate of each attribute of a class: none where Python or a library's base calls it by itself."""
    libraries = tuple(b for b in kind.__mro__ if _is_library(b.__module__) and b not in _OWN_RULES)

    def gate(key: str) -> str | None:
        called = key in _CALLED or (key.startswith("__") and key not in _NOT_CALLED)
        return None if called or any(hasattr(b, key) for b in libraries) else key

    return gate


@functools.cache
def _slots_of(kind: type) -> tuple[str, ...]:
    names: list[str] = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else list(slots)
    return tuple(n for n in names if n not in ("__dict__", "__weakref__"))


class _Cell:
    """A closure's cell, read like a container."""

    __slots__ = ("cell",)

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __getitem__(self, key: object) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:  # a cell that is filled later, as in a recursive definition
            return MISSING


class _Slots:
    """An object's slots, read like a container."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getitem__(self, key: str) -> Any:
        return getattr(self.value, key, MISSING)


def _nothing(value: Any, path: str) -> Held:  # noqa: ARG001 - one signature for all rules
    return Held()


_RULES: tuple[tuple[Any, Callable[[Any, str], Held]], ...] = (
    (Wrapper, _wrapper),
    (nn.Module, _torch_module),
    (dict, _dict),
    (list, _list),
    ((tuple, set, frozenset, collections.deque), _items),
    ((array.array, bytearray, np.ndarray), _bytes),
    (contextvars.ContextVar, _variable),
    (types.MethodType, _method),
    (functools.partial, _partial),
    (types.FunctionType, _function),
    (Code, _code),
    (types.CellType, _nothing),
    (types.ModuleType, _module),
    (type, _class),
)
