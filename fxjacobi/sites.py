"""Finding the user's file and line for a recorded operation, cheaply: it happens once an operation."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.graph import Site

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

__all__ = ["SiteFinder"]

_OWN = Path(__file__).resolve().parent
_INTERNAL = tuple(
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).resolve().parent, _OWN, _OWN.parent / "passes")
)


class SiteFinder:
    """Walks out of torch and fxjacobi to the innermost frame of anyone else, remembering every code object met.

    Attributes:
        outermost: The code that called the run. A model all of whose code is torch's own is named by the line that
            called it, but what that line reads (its loop counter, the compiled module itself) is not the model's.
        found: Called once with each code that the run is in when it calls an operation, and with its globals.
    """

    def __init__(self, outermost: CodeType | None = None) -> None:
        self.outermost = outermost
        self._internal: dict[CodeType, bool] = {}
        self._sites: dict[tuple[CodeType, int], Site] = {}
        self.found: Callable[[CodeType, dict[str, Any]], None] | None = None

    def find(self) -> Site | None:
        """Return the site of the operation that is being dispatched."""
        frame: FrameType | None = sys._getframe(2)
        inside = True
        while frame is not None:
            code = frame.f_code
            if not self._is_internal(code):
                key = (code, frame.f_lasti)
                site = self._sites.get(key)
                if site is None:
                    site = self._sites[key] = Site(code.co_filename, frame.f_lineno, code.co_name)
                    if inside:
                        self._report(frame)
                return site
            inside = inside and code is not self.outermost
            frame = frame.f_back
        return None

    def _is_internal(self, code: CodeType) -> bool:
        internal = self._internal.get(code)
        if internal is None:
            path = os.path.realpath(code.co_filename)
            internal = path.startswith(_INTERNAL) or code.co_filename.startswith("<frozen")
            self._internal[code] = internal
        return internal

    def _report(self, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code is not self.outermost:
            if self.found is not None and not self._is_internal(frame.f_code):
                self.found(frame.f_code, frame.f_globals)
            frame = frame.f_back
