"""The Python in README.md and docs/ runs, block after block, and the README's commands are the ones CI runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text())


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_there_are_pages_with_code() -> None:
    assert {"tutorial.md", "how-to.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": f"docs_{page.stem.replace('-', '_')}"}
    for number, block in enumerate(blocks(page.read_text(), "python")):
        exec(compile(block, f"{page.name} block {number}", "exec"), namespace)


def test_the_python_of_the_readme_runs() -> None:
    namespace: dict[str, Any] = {"model": torch.nn.Linear(3, 3), "x": torch.randn(2, 3)}
    (block,) = blocks((ROOT / "README.md").read_text(), "python")
    exec(compile(block, "README.md", "exec"), namespace)
    assert torch.equal(namespace["y"], namespace["model"](namespace["x"]))


@pytest.mark.parametrize(("marker", "last"), [("test command", "pytest -n 2"), ("demo command", "fxjacobi demo")])
def test_the_readmes_commands_do_all_their_own_set_up(marker: str, last: str) -> None:
    text = (ROOT / "README.md").read_text()
    (after,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)```", text, flags=re.DOTALL)
    assert len(after.strip().splitlines()) == 1
    assert "python3 -m venv .venv" in after
    assert "-c constraints.txt" in after
    assert after.strip().endswith(last)


def test_ci_takes_the_test_command_from_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "<!-- test command -->" in script
    assert "pytest -n" not in script, "the command stands in the README only"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
