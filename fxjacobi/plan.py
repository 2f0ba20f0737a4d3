"""The plan: the blocks of a specialisation in Gauss-Seidel order, each with its method, proof, cost and reason."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import networkx as nx
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fxjacobi.loops import Kind

__all__ = ["BlockPlan", "Candidate", "Plan"]


def _short(site: str) -> str:
    """The last two parts of a site's path: enough to find it, and no wider on one machine than on another."""
    return "/".join(Path(site).parts[-2:]) if site else ""


def _memory(size: int | None) -> str:
    """A number of bytes to three digits, in the unit that fits."""
    if size is None:
        return ""
    value, units = float(size), ["B", "KiB", "MiB", "GiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method that was considered for a block, with what measuring it gave.

    Args:
        method: Its name and options.
        seconds: Median wall time of one solve, or ``None`` where it was not measured.
        sweeps: Sweeps of that solve.
        lawful: Whether the contract in force admits it.
        note: Why it was or was not taken.
    """

    method: str
    seconds: float | None = None
    sweeps: int | None = None
    lawful: bool = True
    note: str = ""

    def __str__(self) -> str:
        measured = f"{self.seconds * 1e3:.3f} ms" if self.seconds is not None else ""
        sweeps = f"{self.sweeps} sweeps" if self.sweeps is not None and self.method != "sequential" else ""
        return f"{self.method}: " + ", ".join(part for part in (measured, sweeps, self.note) if part)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One block of equations.

    Args:
        name: The block's name in the emitted module (``map_0``, ``jacobi_1``).
        kind: What its dependence structure is; ``None`` for straight code.
        method: How it is solved.
        equations: Its number of equations ``T`` (1 for straight code).
        operations: ATen operations in one equation.
        reason: Why this method.
        proof: What was proven to make the method lawful, if it needed one.
        nodes: Names of the rolled graph's nodes that it holds; each node is in exactly one block.
        site: The user's ``file:line`` of its first operation.
        candidates: The methods considered.
        memory_bytes: Estimated peak memory of a solve beyond its operands (:mod:`fxjacobi.footprint`), where it is known.
    """

    name: str
    kind: Kind | None
    method: str
    equations: int
    operations: int
    reason: str
    proof: str = ""
    nodes: tuple[str, ...] = ()
    site: str = ""
    candidates: tuple[Candidate, ...] = ()
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a specialisation does with a model.

    Args:
        blocks: In Gauss-Seidel (topological) order.
        edges: Pairs of block names, producer first.
        solved: Whether calls run the emitted module; otherwise they run the original callable.
        reason: Why.
        contract: ``"exact"`` or the tolerance.
        ordinary_s: Measured seconds of the ordinary run.
        solved_s: Measured seconds of the emitted module.
        refusals: What could not be captured, collapsed or batched, as ``file:line: reason``.
        would_gain: What another contract would gain.
    """

    blocks: tuple[BlockPlan, ...]
    edges: tuple[tuple[str, str], ...]
    solved: bool
    reason: str
    contract: str = "exact"
    ordinary_s: float | None = None
    solved_s: float | None = None
    refusals: tuple[str, ...] = ()
    would_gain: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        table = Table(title=None, show_edge=False, pad_edge=False, box=None)
        sized = any(block.memory_bytes is not None for block in self.blocks)
        columns = ("block", "kind", "method", "equations", "ops", *(("memory",) if sized else ()), "where", "why")
        for column in columns:
            justify: Literal["left", "right"] = "right" if column in ("equations", "ops", "memory") else "left"
            table.add_column(column, justify=justify, overflow="fold", no_wrap=column == "where")
        for block in self.blocks:
            table.add_row(
                block.name,
                block.kind.value if block.kind else "straight",
                block.method,
                str(block.equations),
                str(block.operations),
                *((_memory(block.memory_bytes),) if sized else ()),
                _short(block.site),
                "; ".join(part for part in (block.reason, block.proof) if part),
            )
        buffer = io.StringIO()
        # Reasons hold brackets of their own, as fxjacobi[native]: no markup.
        console = Console(file=buffer, width=160, no_color=True, highlight=False, markup=False)
        console.print(f"fxjacobi plan ({self.contract}): {'solved' if self.solved else 'original'}. {self.reason}")
        if self.blocks:
            console.print(table)
        if self.ordinary_s is not None and self.solved_s is not None:
            console.print(
                f"ordinary run {self.ordinary_s * 1e3:.3f} ms, solved {self.solved_s * 1e3:.3f} ms, "
                f"ratio {self.ordinary_s / self.solved_s:.2f}"
            )
        for line in self._measured():
            console.print(line)
        for refusal in self.refusals:
            console.print(f"refused: {refusal}")
        for line in self.would_gain:
            console.print(line)
        return buffer.getvalue().rstrip()

    def _measured(self) -> list[str]:
        """A line for each candidate that was considered for a block."""
        return [f"{block.name}: {candidate}" for block in self.blocks for candidate in block.candidates]

    def to_networkx(self) -> nx.DiGraph:
        """The blocks as a directed graph, their :class:`BlockPlan` fields as node attributes."""
        graph = nx.DiGraph()
        for block in self.blocks:
            graph.add_node(
                block.name,
                kind=block.kind.value if block.kind else "straight",
                method=block.method,
                equations=block.equations,
                operations=block.operations,
                reason=block.reason,
                site=block.site,
            )
        graph.add_edges_from(self.edges)
        return graph

    def to_dot(self) -> str:
        """The blocks in Graphviz's language."""
        lines = ["digraph plan {", "  rankdir=TB;", '  node [shape=box, fontname="monospace"];']
        for block in self.blocks:
            label = f"{block.name}\\n{block.method}, {block.equations} equations"
            lines.append(f'  "{block.name}" [label="{label}"];')
        lines += [f'  "{a}" -> "{b}";' for a, b in self.edges]
        return "\n".join([*lines, "}"])

    def to_html(self, path: str | Path) -> None:
        """Write the plan as one self-contained page."""
        head = ["block", "kind", "method", "equations", "ops", "memory", "where", "why"]
        rows = [
            (
                b.name, b.kind.value if b.kind else "straight", b.method, b.equations, b.operations,
                _memory(b.memory_bytes), b.site, "; ".join(part for part in (b.reason, b.proof) if part),
            )
            for b in self.blocks
        ]  # fmt: skip
        cells = "\n".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        titles = "".join(f"<th>{h}</th>" for h in head)
        notes = "".join(f"<li>{html.escape(n)}</li>" for n in (*self._measured(), *self.refusals, *self.would_gain))
        timing = ""
        if self.ordinary_s is not None and self.solved_s is not None:
            timing = f"<p>Ordinary {self.ordinary_s * 1e3:.3f} ms, solved {self.solved_s * 1e3:.3f} ms.</p>"
        page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>fxjacobi plan</title>
<style>body{{font:14px/1.5 system-ui;margin:2rem}}td,th{{padding:.2rem .8rem;text-align:left;
border-bottom:1px solid #ddd;font-family:ui-monospace,monospace;vertical-align:top}}</style>
<h1>fxjacobi plan ({html.escape(self.contract)})</h1><p>{html.escape(self.reason)}</p>{timing}
<table><tr>{titles}</tr>{cells}</table><ul>{notes}</ul></html>"""
        Path(path).write_text(page, encoding="utf-8")
