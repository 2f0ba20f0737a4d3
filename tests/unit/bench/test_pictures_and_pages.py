"""Pictures and tables are made from the files that a run wrote, and say what was not measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from fxjacobi.bench import Benchmark, Row, Settings, run
from fxjacobi.bench.page import fill
from fxjacobi.bench.pictures import draw
from fxjacobi.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = """# Results

<!-- table: two -->
<!-- end -->

Text that stays.

<!-- table: other -->
| measured | before |
<!-- end -->

<!-- table: never -->
<!-- end -->
"""


class Two(Benchmark):
    name = "two"
    summary = "two rows"
    fails = False

    def cases(self) -> tuple[str, ...]:
        return ("first", "second", "third", "fourth")

    def rows(self, settings: Settings) -> Iterator[Row]:
        yield Row("first", {"ordinary_s": 1.5, "sweeps": 3, "equal": True})
        if self.fails:
            raise AssertionError("the second row differs")
        yield Row("second", {"ordinary_s": 2.5, "note": "a | b", "graphed_refused": "it draws"})
        yield Row("third", {"not_measured": "its share was spent"})


class Never(Two):
    name = "never"


def rows_of_everything() -> dict[str, list[Row]]:
    methods = {"exact": 1.7, "chunked": 5.0, "quasi_newton": 0.1}
    shapes = [(64, 1), (1024, 1), (1024, 8)]
    speedups = [Row(f"T={t}", {"steps": t, "batch": b, "ordinary_s": 0.1, **methods}) for t, b in shapes]
    errors = {"1": 0.5, "2": float("inf"), "4": 1e-7, "ordinary_error": 2e-7}
    convergence = [
        Row(case, {"method": method, **errors})
        for case in ("GRU", "DDIM")
        for method in ("Jacobi", "chunked, 32 steps")
    ]
    device = [
        Row(f"GRU, T={t}, B={b}", {"eager_s": 1.0, "solved_s": 0.01, "exact_s": 0.2})
        for t in (1024, 4096)
        for b in (1, 8, 64)
    ]
    device.append(Row("GRU, T=16384, B=64", {"not_measured": "no time"}))
    return {"speedups": speedups, "convergence": convergence, "gpu-gru": device, "gpu-lstm": device[-1:]}


def test_every_picture_is_drawn_and_the_same_rows_give_the_same_file(tmp_path: Path) -> None:
    files = draw(rows_of_everything(), tmp_path / "new" / "folder", where="a device")
    assert [file.name for file in files] == ["speedups.svg", "convergence.svg", "gpu-gru.svg"]
    for file in files:
        text = file.read_text()
        assert len(text) < 300_000
        assert "a device" in text
        assert "chunked" in text or "fxjacobi" in text
    again = draw(rows_of_everything(), tmp_path, where="a device")
    assert [a.read_bytes() for a in again] == [f.read_bytes() for f in files]


def test_a_page_is_filled_and_says_what_was_not_measured(tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "b.json"
    page.write_text(PAGE)
    run([Two()], Settings(), json_file=file, console=Console(quiet=True))
    assert fill(page, [file], [Two(), Never()]) == ["two"]
    text = page.read_text()
    assert "| case | ordinary | sweeps | equal | note |" in text
    assert "| second | 2.5 s |  |  | a \\| b |" in text
    assert "Without graphed: second (it draws)." in text
    assert f"torch {torch.__version__}" in text
    assert "Not measured: third (its share was spent); fourth." in text
    assert "| measured | before |" in text
    assert "Not measured: first; second; third; fourth." in text
    assert "Text that stays." in text
    assert fill(page, [file], [Two(), Never()]) == ["two"]
    assert page.read_text() == text
    assert "![" not in text
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "two.svg").touch()
    fill(page, [file], [Two(), Never()])
    assert "](pictures/two.svg)" in page.read_text()


def test_a_quick_run_fills_no_page(tmp_path: Path) -> None:
    page, file = tmp_path / "page.md", tmp_path / "b.json"
    page.write_text(PAGE)
    run([Two()], Settings(quick=True), json_file=file, console=Console(quiet=True))
    with pytest.raises(ValueError, match="quick"):
        fill(page, [file], [Two()])
    assert page.read_text() == PAGE


def test_a_run_is_resumed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, console = tmp_path / "b.json", Console(quiet=True)
    run([Never()], Settings(), json_file=file, console=console)
    monkeypatch.setattr(Two, "fails", True)
    with pytest.raises(AssertionError, match="differs"):
        run([Never(), Two()], Settings(), json_file=file, console=console, resume=True)
    assert '"unfinished"' in file.read_text()  # the row that was done, under a name of its own
    monkeypatch.setattr(Two, "fails", False)
    monkeypatch.setattr(Never, "rows", None)  # kept: not run again
    results = run([Never(), Two()], Settings(), json_file=file, console=console, resume=True)
    assert [len(rows) for rows in results.values()] == [3, 3]
    with pytest.raises(ValueError, match="another rounds"):
        run([Two()], Settings(rounds=7), json_file=file, console=console, resume=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs --json"),
        (["--pictures", "here"], "name it by --json or --read"),
        (["--read", "b.json"], "--read needs --pictures"),
        (["--read", "b.json", "--page", "page.md"], "b.json"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_requests_that_make_no_sense(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.json").write_text("[1, 2]")
    assert main(["bench", "--read", str(tmp_path / "b.json"), "--pictures", str(tmp_path)]) == 2
    assert "was not written by fxjacobi bench" in capsys.readouterr().err


def test_pictures_are_drawn_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Everything(Benchmark):
        name = "speedups"
        summary = "made up"

        def rows(self, settings: Settings) -> Iterator[Row]:
            yield from rows_of_everything()["speedups"]

    run([Everything()], Settings(), json_file=tmp_path / "b.json", console=Console(quiet=True))
    assert main(["bench", "--read", str(tmp_path / "b.json"), "--pictures", str(tmp_path / "p")]) == 0
    assert (tmp_path / "p" / "speedups.svg").exists()
    assert "drawn" in capsys.readouterr().out
