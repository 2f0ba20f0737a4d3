"""``python -m fxjacobi`` is the ``fxjacobi`` command."""

from __future__ import annotations

import sys

from fxjacobi.cli import main

if __name__ == "__main__":
    sys.exit(main())
