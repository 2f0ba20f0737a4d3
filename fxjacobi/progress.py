"""A progress bar on standard error, shown on a terminal and silent elsewhere."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["bar"]


@contextmanager
def bar(
    description: str, total: int | None = None, *, console: Console | None = None, after_s: float = 0.0
) -> Iterator[Callable[[], None]]:
    """Show a bar for ``total`` steps while the context is open, and yield the function that counts one step.

    Args:
        description: What is being done.
        total: Number of steps; ``None`` shows activity only.
        console: Where to draw; standard error by default.
        after_s: Seconds that the work must last before the bar shows, at the next step.
    """
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    display = Progress(*columns, console=console, disable=not console.is_terminal)
    task = display.add_task(description, total=total)
    begun = time.monotonic()

    def tick() -> None:
        display.advance(task)
        if not display.live.is_started and time.monotonic() - begun >= after_s:
            display.start()

    if after_s <= 0:
        display.start()
    try:
        yield tick
    finally:
        if display.live.is_started:
            display.stop()
