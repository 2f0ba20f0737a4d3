"""Finding the user's file and line for a recorded operation, cheaply: it happens once an operation."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.graph import Site

if TYPE_CHECKING:
    from types import CodeType, FrameType

__all__ = ["SiteFinder"]

_OWN = Path(__file__).resolve().parent
_INTERNAL = tuple(
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).resolve().parent, _OWN, _OWN.parent / "passes")
)


class SiteFinder:
    """Walks out of torch and fxjacobi to the innermost frame of anyone else, remembering every code object met.

    Attributes:
        namespaces: The globals that the user's code reads, with the names it reads (for guards on them).
    """

    def __init__(self) -> None:
        self._internal: dict[CodeType, bool] = {}
        self._sites: dict[tuple[CodeType, int], Site] = {}
        self.namespaces: dict[CodeType, dict[str, Any]] = {}

    def find(self) -> Site | None:
        """Return the site of the operation that is being dispatched."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            internal = self._internal.get(code)
            if internal is None:
                path = os.path.realpath(code.co_filename)
                internal = path.startswith(_INTERNAL) or code.co_filename.startswith("<frozen")
                self._internal[code] = internal
                if not internal:
                    self.namespaces[code] = frame.f_globals
            if not internal:
                key = (code, frame.f_lasti)
                site = self._sites.get(key)
                if site is None:
                    site = self._sites[key] = Site(code.co_filename, frame.f_lineno, code.co_name)
                return site
            frame = frame.f_back
        return None
