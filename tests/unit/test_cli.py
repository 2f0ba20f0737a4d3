from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import fxjacobi
from fxjacobi.cli import main

if TYPE_CHECKING:
    from pathlib import Path

MODEL = """
import torch


class Wrong(torch.nn.Module):
    calls = 0

    def forward(self, x):
        Wrong.calls += 1
        return x + Wrong.calls


def repeated():
    def model(x, c):
        for _ in range(20):
            x = (x * 3 + c) % 7
        return x
    return model, (torch.arange(4), torch.ones(4, dtype=torch.int64))


def changing():
    return Wrong(), (torch.ones(2),)


def nothing():
    return None
"""


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working folder, importable by a name of its own."""
    name = f"target_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    return name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"fxjacobi {fxjacobi.__version__}\n"


def test_module_form_runs_the_same_command() -> None:
    command = [sys.executable, "-m", "fxjacobi", "--version"]
    assert fxjacobi.__version__ in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_explain_prints_the_plan_and_writes_the_page(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", f"{target}:repeated", "--html", str(tmp_path / "plan.html")]) == 0
    assert "fxjacobi plan (exact)" in capsys.readouterr().out
    assert "<table>" in (tmp_path / "plan.html").read_text()


def test_a_page_that_cannot_be_written_is_refused(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{target}:repeated", "--html", "/nonexistent/plan.html"]) == 2
    assert "--html" in capsys.readouterr().err


def test_verify_says_yes(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{target}:repeated"]) == 0
    assert "equal: yes" in capsys.readouterr().out


def test_verify_says_no_and_fails(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    # The two runs of this model differ by construction: it counts its calls in its class.
    assert main(["verify", f"{target}:changing"]) == 1
    assert "equal: no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "no_colon"], "is not module:function"),
        (["explain", "no_such_module_here:f"], "no module 'no_such_module_here'"),
        (["explain", "fxjacobi.cli:no_such"], "has no function 'no_such'"),
        (["verify", "{target}:nothing"], "returned NoneType, not"),
        (["bench", "--only", "no-such"], "no benchmark is called no-such"),
        (["bench", "--threads", "0"], "--threads must be at least 1"),
        (["demo", "--out", "no/such/folder/x.png"], "there is no folder"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    target: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(target=target) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_import_error_inside_the_module_surfaces(target: str, tmp_path: Path) -> None:
    (tmp_path / f"{target}_broken.py").write_text("import surely_not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed_anywhere"):
        main(["explain", f"{target}_broken:f"])


def test_bench_list_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    from fxjacobi.bench import EVERYTHING

    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(benchmark.name in out for benchmark in EVERYTHING)
