"""Fills the tables of a page of documentation from the files that ``fxjacobi bench --json`` wrote.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; what stands between them is replaced. Where the page's
folder has a picture ``pictures/NAME.svg``, it stands below the table.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fxjacobi.bench.runner import read, shown, titles

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fxjacobi.bench.benchmark import Benchmark, Row

__all__ = ["fill"]

_TABLE = re.compile(r"<!-- table: (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)


def fill(page: Path, files: Sequence[Path], benchmarks: Sequence[Benchmark]) -> list[str]:
    """Rewrite every marked table of ``page`` for which there are measurements, or a list of rows that want measuring.

    Args:
        page: A page of Markdown.
        files: What :func:`fxjacobi.bench.run` wrote; a later file's benchmark replaces an earlier one's.
        benchmarks: Every benchmark, for the names of rows that were not measured.

    Returns:
        The names of the tables that were filled.

    Raises:
        ValueError: A file was written by something else, or by a quick run, whose numbers say nothing.
    """
    planned = {benchmark.name: benchmark.cases() for benchmark in benchmarks}
    found: dict[str, str] = {}
    for file in files:
        facts, rows, seconds = read(file)
        if facts.get("quick"):
            raise ValueError(f"{file} was written by a quick run; its numbers say nothing")
        for name, each in rows.items():
            cases = {row.case for row in each}
            missing = [case for case in planned.get(name, ()) if case not in cases]
            found[name] = _table(facts, each, seconds.get(name), missing)
    text = page.read_text(encoding="utf-8")
    filled: list[str] = []

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name in found:
            filled.append(name)
            drawn = page.parent / "pictures" / f"{name}.svg"
            picture = f"\n\n![The measurements of {name}, drawn](pictures/{name}.svg)" if drawn.exists() else ""
            return f"<!-- table: {name} -->\n{found[name]}{picture}\n<!-- end -->"
        if "|" in match[0] or not planned.get(name):
            return match[0]  # measured before: it stays
        return f"<!-- table: {name} -->\nNot measured: {'; '.join(planned[name])}.\n<!-- end -->"

    page.write_text(_TABLE.sub(replaced, text), encoding="utf-8")
    return filled


def _table(facts: Mapping[str, str | int], rows: Sequence[Row], seconds: float | None, missing: Sequence[str]) -> str:
    left_out = [
        *(f"{row.case} ({row.values['not_measured']})" for row in rows if "not_measured" in row.values),
        *missing,
    ]
    rows = [row for row in rows if "not_measured" not in row.values]
    columns = {column: title for column, title in titles(rows).items() if not column.endswith("_refused")}
    lines = ["| " + " | ".join(["case", *columns.values()]) + " |", "|" + "---|" * (len(columns) + 1)]
    for row in rows:
        cells = [re.sub(r" us$", " µs", shown(c, row.values[c])) if c in row.values else "" for c in columns]
        lines.append("| " + " | ".join([row.case, *(cell.replace("|", "\\|") for cell in cells)]) + " |")
    took = "" if seconds is None else f"; {seconds:.0f} s in all"
    told = f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, Python {facts['python']}, {facts['rounds']} rounds"
    parts = ["\n".join(lines) if rows else "", f"Measured on {told}{took}." if rows else ""]
    for column in titles(rows):
        if column.endswith("_refused"):
            reasons = dict.fromkeys(str(row.values[column]) for row in rows if column in row.values)
            for reason in reasons:
                closed = "; ".join(row.case for row in rows if row.values.get(column) == reason)
                parts.append(f"Without {column.removesuffix('_refused').replace('_', ' ')}: {closed} ({reason}).")
    parts.append(f"Not measured: {'; '.join(left_out)}." if left_out else "")
    return "\n\n".join(part for part in parts if part)
