"""Sparing the garbage collector a walk over the whole process while a run is recorded and compiled."""

from __future__ import annotations

import contextlib
import gc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["settled_heap"]


_INTERPRETERS_OWN = 10_000
"""More than Python 3.12 keeps frozen of its own (375 objects, seen), and less than any program that has imported torch."""


@contextlib.contextmanager
def settled_heap() -> Iterator[None]:
    """Inside, the collector looks only at objects that were made inside.

    A graph of 16,000 nodes is enough for two full collections, each of which walks everything that torch and the
    program keep: a third of the time of a recording. Garbage that lies about at the beginning is collected afterwards.
    A program that freezes its heap itself keeps what it has frozen.
    """
    if gc.get_freeze_count() > _INTERPRETERS_OWN:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
