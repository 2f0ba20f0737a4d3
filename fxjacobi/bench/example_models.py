"""The example models of the source tree, which the wheel does not hold."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

__all__ = ["example"]

_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> Any:
    """Return the module ``examples/name.py``.

    Raises:
        FileNotFoundError: fxjacobi does not run from its source tree.
    """
    if not (_EXAMPLES / f"{name}.py").exists():
        raise FileNotFoundError(f"this benchmark needs examples/{name}.py: run it in a clone of the source tree")
    if str(_EXAMPLES) not in sys.path:
        sys.path.append(str(_EXAMPLES))
    return importlib.import_module(name)
