"""What a recorded run read from Python: the values a specialisation is valid for.

A graph holds what the model's attributes, the globals and the closures *were*. A :class:`Watch` remembers them and
says, in well under a microsecond an entry, whether they still are. Tensors are compared by identity: their contents
are read live, only rebinding one (``model.weight = other``) invalidates a specialisation.
"""

from __future__ import annotations

import dis
import functools
import re
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxjacobi.aliasing import storage_key
from fxjacobi.graph import TensorSpec, spec_of_value
from fxjacobi.trees import PRIMITIVES

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["MISSING", "Change", "Watch", "Wrapper"]

_LIBRARIES = ("torch", "numpy", "builtins", "functools", "math", "typing", "collections", "fxjacobi")
_MODULE_INTERNALS = frozenset(
    {
        "_non_persistent_buffers_set", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
        "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs",
        "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    }
)  # fmt: skip
_INSIDE = re.compile(r"\._(parameters|buffers|modules)\.")
_MAX_ENTRIES = 200_000


@dataclass(frozen=True, slots=True)
class Change:
    """An entry that no longer holds what it held: ``container[key]`` was ``before`` and is ``after``."""

    name: str
    container: Any
    key: Any
    before: Any
    after: Any


class Wrapper:
    """A callable that keeps books about its calls: a run depends on what it wraps, not on its books.

    It may well be reached by the run that it wraps, as in ``self.fast = fxjacobi.compile(self.loop)``.
    """

    def wrapped(self) -> Any:
        """What a recorded run calls in its place."""
        raise NotImplementedError


class Watch:
    """Walks everything reachable from some roots once; see the module's docstring.

    Attributes:
        tensors: Storage key -> (qualified name, tensor) of every tensor reached.
        modules: The ``nn.Module`` instances reached.
    """

    def __init__(self) -> None:
        self.tensors: dict[int, tuple[str, torch.Tensor]] = {}
        self.modules: list[nn.Module] = []
        self._entries: list[tuple[Any, Any, Any, bool]] = []
        self._names: list[str] = []
        self._lengths: list[tuple[Any, int]] = []
        self._keys: list[tuple[dict[Any, Any], frozenset[Any], str]] = []
        self._specs: list[tuple[Any, Any, TensorSpec]] = []
        self._storages: list[tuple[torch.Tensor, int]] = []
        self._grads: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._seen: dict[int, Any] = {}

    # -- walking --------------------------------------------------------------------------------------------------

    def add(self, root: Any, name: str) -> None:
        """Walk everything reachable from ``root``."""
        stack = [(root, name)]
        while stack and len(self._entries) < _MAX_ENTRIES:
            value, path = stack.pop()
            if isinstance(value, PRIMITIVES) or id(value) in self._seen:
                continue
            self._seen[id(value)] = value  # keeping it alive keeps its id its own
            stack.extend(self._children(value, path))

    def _children(self, value: Any, path: str) -> list[tuple[Any, str]]:
        if isinstance(value, torch.Tensor):
            if value.layout is torch.strided:
                key = storage_key(value)
                self.tensors.setdefault(key, (path, value))
                self._storages.append((value, key))
                if value.is_leaf:
                    self._grads.append((value, value.grad))
            return []
        if isinstance(value, Wrapper):
            return [(value.wrapped(), path)]
        if isinstance(value, nn.Module):
            self.modules.append(value)
            fields = {k: v for k, v in value.__dict__.items() if k not in _MODULE_INTERNALS}
            self._keys.append((value.__dict__, frozenset(value.__dict__), path))
            children = self._mapping(value.__dict__, fields, path)
            if not type(value).__module__.startswith("torch."):
                children += self._class_functions(type(value), path)
            return children
        if isinstance(value, dict):
            self._keys.append((value, frozenset(value), path))
            return self._mapping(value, value, path)
        if isinstance(value, list):
            self._lengths.append((value, len(value)))
            return self._mapping(value, dict(enumerate(value)), path)
        if isinstance(value, (tuple, set, frozenset)):
            return [(item, f"{path}.{i}") for i, item in enumerate(value)]
        if isinstance(value, types.MethodType):
            return [(value.__self__, path), (value.__func__, path)]
        if isinstance(value, functools.partial):
            return [(value.func, path), (value.args, path), (value.keywords, path)]
        if isinstance(value, types.FunctionType):
            return self._function(value, path)
        if isinstance(value, types.CellType):
            return []
        return self._object(value, path)

    def _object(self, value: Any, path: str) -> list[tuple[Any, str]]:
        if isinstance(value, (type, types.ModuleType)):
            return []
        fields: Any = getattr(value, "__dict__", None)
        if isinstance(fields, dict) and not type(value).__module__.startswith("torch._"):
            self._keys.append((fields, frozenset(fields), path))
            children = self._mapping(fields, dict(fields), path)
            if type(value).__module__.partition(".")[0] not in _LIBRARIES:
                children += self._class_functions(type(value), path)
            return children
        return []

    def _mapping(self, container: Any, fields: Mapping[Any, Any], path: str) -> list[tuple[Any, str]]:
        children = []
        for key, item in fields.items():
            primitive = isinstance(item, PRIMITIVES)
            self._entries.append((container, key, item, primitive))
            name = path if isinstance(container, _Cell) else f"{path}.{key}"
            self._names.append(name)
            if not primitive:
                children.append((item, _INSIDE.sub(".", name)))
        return children

    def _function(self, function: types.FunctionType, path: str) -> list[tuple[Any, str]]:
        if (function.__module__ or "").partition(".")[0] in _LIBRARIES:
            return []
        children: list[tuple[Any, str]] = [(function.__defaults__, path), (function.__kwdefaults__, path)]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                item = cell.cell_contents
            except ValueError:  # a cell that is filled later, as in a recursive definition
                continue
            children += self._mapping(_Cell(cell), {0: item}, f"{path}.{name}" if path else name)
        self.add_code(function.__code__, function.__globals__, children)
        return children

    def add_code(
        self, code: types.CodeType, namespace: dict[str, Any], children: list[tuple[Any, str]] | None = None
    ) -> None:
        """Watch the globals that ``code`` reads."""
        mark = (id(code), id(namespace))
        if hash(mark) in self._seen:
            return
        self._seen[hash(mark)] = code
        found: list[tuple[Any, str]] = []
        codes = [code]
        while codes:
            each = codes.pop()
            codes += [c for c in each.co_consts if isinstance(c, types.CodeType)]
            fields = {n: namespace[n] for n in _globals_read(each) if n in namespace}
            fields = {
                n: v for n, v in fields.items()
                if not isinstance(v, (types.ModuleType, type, types.BuiltinFunctionType)) and not n.startswith("__")
            }  # fmt: skip
            found += self._mapping(namespace, fields, "")
        found = [(item, name.removeprefix(".")) for item, name in found]
        if children is not None:
            children += found
        else:
            for item, name in found:
                self.add(item, name)

    def _class_functions(self, kind: type, path: str) -> list[tuple[Any, str]]:
        children: list[tuple[Any, str]] = []
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] in _LIBRARIES:
                continue
            for item in vars(base).values():
                function = item.__func__ if isinstance(item, (staticmethod, classmethod)) else item
                function = function.fget if isinstance(function, property) else function
                if isinstance(function, types.FunctionType):
                    children.append((function, path))
        return children

    # -- checking -------------------------------------------------------------------------------------------------

    def holds(self) -> bool:
        """Whether every entry still is what it was."""
        for container, key, expected, primitive in self._entries:
            try:
                value = container[key]
            except (KeyError, IndexError):
                return False
            if value is not expected and not (primitive and type(value) is type(expected) and value == expected):
                return False
        for container, length in self._lengths:
            if len(container) != length:
                return False
        for mapping, keys, _ in self._keys:
            if len(mapping) != len(keys):
                return False
        for container, key, spec in self._specs:
            if key not in container or spec_of_value(container[key]) != spec:
                return False
        return True

    def changes(self) -> list[Change]:
        """Every entry that no longer holds, and every key that is new in a watched dictionary or module."""
        found = []
        for (container, key, expected, primitive), name in zip(self._entries, self._names, strict=True):
            missing = key not in container if isinstance(container, dict) else False
            value = MISSING if missing or (isinstance(container, list) and key >= len(container)) else container[key]
            if value is not expected and not (primitive and type(value) is type(expected) and value == expected):
                found.append(Change(name.removeprefix("."), container, key, expected, value))
        for mapping, keys, path in self._keys:
            found += [Change(f"{path}.{k}", mapping, k, MISSING, v) for k, v in mapping.items() if k not in keys]
        for container, length in self._lengths:
            if len(container) != length:
                found.append(Change("the length of a list or dictionary", container, None, length, len(container)))
        return found

    def replaced_storages(self) -> list[str]:
        """Names of tensors whose memory was exchanged (``p.data = ...``) or that got another ``.grad``."""
        names = [self.tensors[key][0] for tensor, key in self._storages if storage_key(tensor) != key]
        names += [f"{self.tensors[storage_key(t)][0]}.grad" for t, grad in self._grads if t.grad is not grad]
        return names

    def relax(self, container: Any, key: Any, spec: TensorSpec | None, after: Any) -> None:
        """From now on ``container[key]`` is state: only its spec (``None``: being exactly ``after``) must hold."""
        kept = [
            (entry, name)
            for entry, name in zip(self._entries, self._names, strict=True)
            if not (entry[0] is container and entry[1] == key)
        ]
        self._entries, self._names = [e for e, _ in kept], [n for _, n in kept]
        if spec is not None:
            self._specs.append((container, key, spec))
        else:
            self._entries.append((container, key, after, True))
            self._names.append(str(key))

    def knows(self, value: Any) -> bool:
        """Whether ``value`` itself was reached: it was there before the run."""
        return self._seen.get(id(value)) is value

    def count(self, value: Any) -> int:
        """In how many watched places ``value`` itself stands."""
        return sum(expected is value for _, _, expected, _ in self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@functools.cache
def _globals_read(code: types.CodeType) -> tuple[str, ...]:
    """Names that ``code`` loads from its globals (``co_names`` holds those of attributes too)."""
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    return tuple({i.argval: None for i in dis.get_instructions(code) if i.opname in loads})


class _Missing:
    def __repr__(self) -> str:
        return "<missing>"


MISSING = _Missing()


class _Cell:
    """A closure's cell, read like a container."""

    __slots__ = ("cell",)

    def __init__(self, cell: types.CellType) -> None:
        self.cell = cell

    def __getitem__(self, key: int) -> Any:
        try:
            return self.cell.cell_contents
        except ValueError:
            return MISSING
