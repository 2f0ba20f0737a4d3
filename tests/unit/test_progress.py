from __future__ import annotations

import io

from rich.console import Console

from fxjacobi.progress import bar


def test_a_terminal_shows_the_bar() -> None:
    out = io.StringIO()
    with bar("counting", 3, console=Console(file=out, force_terminal=True, width=80)) as tick:
        for _ in range(3):
            tick()
    assert "counting" in out.getvalue()
    assert "3/3" in out.getvalue()


def test_a_file_stays_empty() -> None:
    out = io.StringIO()
    with bar("counting", 3, console=Console(file=out)) as tick:
        tick()
    assert out.getvalue().strip() == ""
