from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console

from fxjacobi.progress import bar

if TYPE_CHECKING:
    import pytest


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


def test_a_bar_waits_until_the_work_has_lasted() -> None:
    for after_s, shown in ((0.0, True), (3600.0, False)):
        out = io.StringIO()
        with bar("measuring", 2, console=Console(file=out, force_terminal=True, width=80), after_s=after_s) as tick:
            tick()
            tick()
        assert ("measuring" in out.getvalue()) == shown


def test_a_bar_shows_at_the_first_step_after_its_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fxjacobi.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    with bar("measuring", 2, console=Console(file=out, force_terminal=True, width=80), after_s=2.0) as tick:
        tick()
        assert out.getvalue() == ""
        now[0] = 2.5
        tick()
        assert "2/2" in out.getvalue()
