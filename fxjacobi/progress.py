"""A progress bar on standard error, shown on a terminal and silent elsewhere."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["bar"]


@contextmanager
def bar(description: str, total: int | None = None, *, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """Show a bar for ``total`` steps while the context is open, and yield the function that counts one step.

    Args:
        description: What is being done.
        total: Number of steps; ``None`` shows activity only.
        console: Where to draw; standard error by default.
    """
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as display:
        task = display.add_task(description, total=total)
        yield lambda: display.advance(task)
