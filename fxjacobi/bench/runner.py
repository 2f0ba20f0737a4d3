"""Runs benchmarks, prints their tables and writes their JSON."""

from __future__ import annotations

import json
import platform
import time
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from fxjacobi.bench.benchmark import Row
from fxjacobi.progress import bar

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fxjacobi.bench.benchmark import Benchmark, Settings

__all__ = ["environment", "read", "run", "shown"]


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
        "quick": settings.quick,
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


def titles(rows: Sequence[Row]) -> dict[str, str]:
    """Return the columns of a table of ``rows``, each with its title."""
    columns = dict.fromkeys(column for row in rows for column in row.values)
    return {column: column.removesuffix("_us").removesuffix("_s").replace("_", " ") for column in columns}


def _print(console: Console, benchmark: Benchmark, rows: Sequence[Row]) -> None:
    """Print the rows as a table, or as several below one another where its columns do not fit beside one another."""
    columns = titles(rows)
    cells = {c: [shown(c, row.values[c]) if c in row.values else "" for row in rows] for c in columns}
    widths = {c: 3 + max(len(columns[c]), *map(len, cells[c])) for c in columns}
    unique = len({row.case for row in rows}) == len(rows)
    names = [row.case if unique else f"{row.case}, {row.values.get('method', '')}" for row in rows]
    room = console.width - 4 - max(map(len, names), default=0)
    groups: list[list[str]] = [[]]
    for column in columns:
        if groups[-1] and sum(widths[c] for c in [*groups[-1], column]) > room:
            groups.append([])
        groups[-1].append(column)
    for place, group in enumerate(groups):
        title = f"{benchmark.name}: {benchmark.summary}" if place == 0 else f"{benchmark.name}, further columns"
        table = Table(title=title, title_justify="left")
        table.add_column("case")
        for column in group:
            table.add_column(columns[column], justify="right")
        for index in range(len(rows)):
            table.add_row(names[index], *(cells[column][index] for column in group))
        console.print(table)


def run(
    benchmarks: Sequence[Benchmark],
    settings: Settings,
    *,
    json_file: Path | None = None,
    console: Console | None = None,
    resume: bool = False,
) -> dict[str, list[Row]]:
    """Run ``benchmarks`` one after the other, print a table of each, and return their rows by name.

    Args:
        benchmarks: What to run.
        settings: The device, the rounds and the seed.
        json_file: Where to write ``{"environment": ..., "benchmarks": {name: [row, ...]}, "seconds": {name: s}}``; kept
            up to date after each row, the rows of a benchmark that is not done yet under ``"unfinished"``.
        console: Where to print; standard output by default.
        resume: Keep what ``json_file`` holds already, and run only what it does not.

    A benchmark that raises does not keep the others from running; its exception is raised once they are through.

    Raises:
        ValueError: ``json_file`` was measured in another environment than this one.
        ExceptionGroup: Several benchmarks failed.
    """
    console = console or Console()
    facts = environment(settings)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    results, seconds = _kept(json_file, facts) if resume and json_file is not None else ({}, {})
    failures: list[Exception] = []
    unfinished: dict[str, list[Row]] = {}
    for benchmark in benchmarks:
        if benchmark.name in results:
            _print(console, benchmark, results[benchmark.name])
            console.print(f"{benchmark.name}: kept, as measured before")
            continue
        rows = unfinished[benchmark.name] = []
        begun = time.perf_counter()
        try:
            with bar(f"{benchmark.name} (rows)") as advance:
                for row in benchmark.rows(settings):
                    rows.append(row)
                    _write(json_file, facts, results, seconds, unfinished)
                    advance()
        except Exception as failure:  # noqa: BLE001 - raised below, once the other benchmarks are through
            failures.append(failure)
            console.print(
                f"{benchmark.name}: failed after {time.perf_counter() - begun:.1f} s: {failure}", markup=False
            )
            continue
        results[benchmark.name] = unfinished.pop(benchmark.name)
        seconds[benchmark.name] = time.perf_counter() - begun
        _print(console, benchmark, rows)
        console.print(f"{benchmark.name}: {seconds[benchmark.name]:.1f} s in all")
        _write(json_file, facts, results, seconds, unfinished)
        wrong = [f"{row.case}: {row.values['failed']}" for row in rows if "failed" in row.values]
        if wrong:
            failures.append(AssertionError(f"{benchmark.name}: {'; '.join(wrong)}"))
    if json_file is not None:
        console.print(f"written to {json_file}")
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise ExceptionGroup("benchmarks failed", failures)
    return results


def _plain(results: dict[str, list[Row]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [{"case": row.case, **row.values} for row in rows] for name, rows in results.items()}


def _write(
    file: Path | None,
    facts: dict[str, str | int],
    results: dict[str, list[Row]],
    seconds: dict[str, float],
    unfinished: dict[str, list[Row]],
) -> None:
    if file is None:
        return
    content: dict[str, Any] = {"environment": facts, "benchmarks": _plain(results), "seconds": seconds}
    if unfinished:
        content["unfinished"] = _plain(unfinished)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)  # a run that is killed leaves whole JSON behind


def read(file: Path) -> tuple[dict[str, str | int], dict[str, list[Row]], dict[str, float]]:
    """Return the environment, the rows by benchmark, and the seconds that each took, of a file that :func:`run` wrote.

    Raises:
        ValueError: The file is none of ours.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = {
            name: [Row(row["case"], {k: v for k, v in row.items() if k != "case"}) for row in found]
            for name, found in content["benchmarks"].items()
        }
        return content["environment"], rows, content.get("seconds", {})
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} was not written by fxjacobi bench ({type(error).__name__}: {error})") from error


def _kept(file: Path, facts: dict[str, str | int]) -> tuple[dict[str, list[Row]], dict[str, float]]:
    if not file.exists():
        return {}, {}
    earlier, rows, seconds = read(file)
    other = sorted(name for name in facts if earlier.get(name) != facts[name])
    if other:
        raise ValueError(f"{file} was measured with another {', '.join(other)}: name another file, or do not resume")
    whole = {name: each for name, each in rows.items() if not any("failed" in row.values for row in each)}
    return whole, {name: seconds[name] for name in whole if name in seconds}
