"""The list of packages is complete, and the built wheel holds every module and no top-level ``passes``."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules_of(root: Path) -> set[str]:
    """Every module file below ``root`` by its path in an installation; ``passes/`` belongs inside ``fxjacobi/``."""
    found = {path.relative_to(root).as_posix() for path in (root / "fxjacobi").rglob("*.py")}
    found |= {f"fxjacobi/{path.relative_to(root).as_posix()}" for path in (root / "passes").rglob("*.py")}
    return {path for path in found if "__pycache__" not in path}


def packages_of(root: Path) -> set[str]:
    return {Path(module).parent.as_posix().replace("/", ".") for module in modules_of(root)}


def unlisted(root: Path, listed: list[str]) -> set[str]:
    return packages_of(root) ^ set(listed)


def test_every_package_folder_is_listed() -> None:
    assert unlisted(ROOT, PYPROJECT["tool"]["setuptools"]["packages"]) == set()


def test_a_missing_package_folder_is_noticed() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert unlisted(ROOT, [name for name in listed if name != "fxjacobi.passes"]) == {"fxjacobi.passes"}
    assert unlisted(ROOT, [*listed, "fxjacobi.gone"]) == {"fxjacobi.gone"}


def test_every_package_folder_has_an_init() -> None:
    without = {
        package for package in packages_of(ROOT) if not (ROOT / package.replace(".", "/") / "__init__.py").exists()
    }
    assert without == set()


def test_passes_is_a_relative_symlink_to_the_top_level_folder() -> None:
    link = ROOT / "fxjacobi" / "passes"
    assert link.is_symlink()
    assert link.readlink().as_posix() == "../passes"


def test_constraints_pin_what_the_project_asks_for() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[normalised(name)] = version
    extras = [wanted for extra in PYPROJECT["project"]["optional-dependencies"].values() for wanted in extra]
    asked = {normalised(re.split(r"[\[<>=!~ ]", wanted)[0]) for wanted in PYPROJECT["project"]["dependencies"] + extras}
    assert asked - {"fxjacobi"} <= set(pinned)
    assert all(pinned.values()), "every constraint is an exact version"


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of a copy of what git would track, so that no build folder of the tree gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "fxjacobi", "passes"):
        subprocess.run(["cp", "-R", str(ROOT / name), str(source)], check=True)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_every_module_and_no_top_level_passes(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == modules_of(ROOT)
    assert "fxjacobi/py.typed" in names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fxjacobi"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_runs_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    empty = tmp_path / "empty"
    empty.mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import fxjacobi, fxjacobi.passes, torch\n"
        "assert fxjacobi.__file__.startswith(sys.argv[1]), fxjacobi.__file__\n"
        "assert fxjacobi.passes.__file__.startswith(sys.argv[1]), fxjacobi.passes.__file__\n"
        "x = torch.randn(3); assert torch.equal(fxjacobi.compile(torch.tanh)(x), torch.tanh(x))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "site")]
    done = subprocess.run(command, cwd=empty, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
