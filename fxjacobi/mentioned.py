"""What code mentions: the names of attributes and globals that it may read."""

from __future__ import annotations

import dis
import functools
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["globals_read", "is_dynamic", "mentioned", "with_nested"]

_DYNAMIC = frozenset(
    {
        "getattr", "hasattr", "setattr", "delattr", "vars", "dir", "eval", "exec", "locals", "globals", "attrgetter",
        "methodcaller", "asdict", "astuple", "fields", "__dict__", "__getattribute__", "getattr_static", "getmembers",
    }
)  # fmt: skip
"""Names by which code may read attributes that it does not mention."""


def mentioned(code: types.CodeType) -> frozenset[str]:
    """Return every name that may be an attribute's in ``code``: names, and texts among its constants."""
    return frozenset(name for each in with_nested(code) for name in _names(each))


def is_dynamic(names: frozenset[str] | set[str]) -> bool:
    """Whether code that mentions ``names`` may read attributes that it does not mention."""
    return not _DYNAMIC.isdisjoint(names)


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    return frozenset(code.co_names) | frozenset(_texts(code.co_consts))


def _texts(constants: tuple[Any, ...]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from _texts(constant)


def with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield ``code`` and the code of functions that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from with_nested(constant)


@functools.cache
def globals_read(code: types.CodeType) -> tuple[str, ...]:
    """Names that ``code`` loads from its globals (``co_names`` holds those of attributes too)."""
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    return tuple({i.argval: None for i in dis.get_instructions(code) if i.opname in loads})
