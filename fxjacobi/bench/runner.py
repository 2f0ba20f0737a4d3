"""Runs benchmarks, prints their tables and writes their JSON."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from fxjacobi.progress import bar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fxjacobi.bench.benchmark import Benchmark, Row, Settings

__all__ = ["environment", "run", "shown"]


def environment(settings: Settings) -> dict[str, str | int]:
    """Return what a measurement depends on: versions, device, threads."""
    cuda = settings.device.type == "cuda"
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(settings.device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "rounds": settings.rounds,
        "seed": settings.seed,
    }


def _processor() -> str:
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}"


def shown(column: str, value: float | int | str | bool) -> str:
    """Return ``value`` as its table shows it: seconds and microseconds in a fitting unit."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (str, int)):
        return str(value)
    seconds = value if column.endswith("_s") else value * 1e-6 if column.endswith("_us") else None
    if seconds is None:
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if abs(seconds) * scale >= 1 or unit == "us":
            return f"{seconds * scale:.3g} {unit}" if abs(seconds) * scale < 1000 else f"{seconds * scale:.0f} {unit}"
    raise AssertionError("unreachable: the last unit fits everything")


def _table(benchmark: Benchmark, rows: Sequence[Row]) -> Table:
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    table = Table(title=f"{benchmark.name}: {benchmark.summary}", title_justify="left")
    table.add_column("case")
    for column in columns:
        table.add_column(column.removesuffix("_us").removesuffix("_s").replace("_", " "), justify="right")
    for row in rows:
        table.add_row(row.case, *(shown(c, row.values[c]) if c in row.values else "" for c in columns))
    return table


def run(
    benchmarks: Sequence[Benchmark],
    settings: Settings,
    *,
    json_file: Path | None = None,
    console: Console | None = None,
) -> dict[str, list[Row]]:
    """Run ``benchmarks`` one after the other, print a table of each, and return their rows by name.

    Args:
        benchmarks: What to run.
        settings: The device, the rounds and the seed.
        json_file: Where to write ``{"environment": ..., "benchmarks": {name: [row, ...]}}``; kept up to date after each.
        console: Where to print; standard output by default.
    """
    console = console or Console()
    facts = environment(settings)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results: dict[str, list[Row]] = {}
    for benchmark in benchmarks:
        rows = results[benchmark.name] = []
        with bar(f"{benchmark.name} (rows)") as advance:
            for row in benchmark.rows(settings):
                rows.append(row)
                advance()
        console.print(_table(benchmark, rows))
        if json_file is not None:
            done = {name: [{"case": row.case, **row.values} for row in rows] for name, rows in results.items()}
            json_file.write_text(json.dumps({"environment": facts, "benchmarks": done}, indent=2) + "\n")
    if json_file is not None:
        console.print(f"written to {json_file}")
    return results
