"""Pictures of measurements, drawn from the rows that ``fxjacobi bench`` wrote. Needs matplotlib."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fxjacobi.bench.benchmark import Row

__all__ = ["draw"]

# Okabe and Ito's palette, which colour-blind readers tell apart; each line has a marker of its own as well.
_STYLES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
    ("#000000", "X"), ("#999999", "*"), ("#8C510A", "<"),
)  # fmt: skip
_NAMES = {
    "exact": "exact contract", "native": "machine code", "quasi_newton": "quasi-Newton", "jacobi": "Jacobi",
    "anderson": "Anderson", "picard": "Picard",
}  # fmt: skip
_GREY = "#555555"
_YLABEL = "times faster than the eager loop"
_SMALLEST = 1e-8  # below it an error of float32 is zero
_LARGEST = 1e2


def draw(rows: Mapping[str, Sequence[Row]], folder: Path, *, where: str) -> list[Path]:
    """Draw every picture that ``rows`` have the measurements for, and return the files.

    Args:
        rows: Rows by benchmark.
        folder: Where to write them; it is made if need be.
        where: The device, for the titles.
    """
    makers: dict[str, Callable[[Sequence[Row], str], Any]] = {
        "speedups": _speedups,
        "convergence": _convergence,
        "gpu-gru": _device,
        "gpu-lstm": _device,
    }
    files: list[Path] = []
    for name, make in makers.items():
        found = [row for row in rows.get(name, ()) if "not_measured" not in row.values]
        if found:
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / f"{name}.svg")
            figure = make(found, where)
            # No date and fixed identifiers: the same measurements give the same file.
            figure.savefig(files[-1], metadata={"Date": None})
    return files


def _figure(panels: int) -> tuple[Any, list[Any]]:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "fxjacobi"
    mpl.rcParams["svg.fonttype"] = "none"  # text stays text: small files, and legible at any size
    lines = -(-panels // 2)
    figure = Figure(figsize=(10, 0.8 + 3.6 * lines), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    axes = list(figure.subplots(lines, 2, squeeze=False, sharey=True).flat)
    for spare in axes[panels:]:
        spare.set_axis_off()
    axes = axes[:panels]
    for axis in axes:
        axis.grid(visible=True, which="major", color="#dddddd", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _ticks(axis: Any, values: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{value:,}" for value in values])
    axis.xaxis.minorticks_off()


def _times(axis: Any) -> None:
    """A logarithmic axis of speed-ups, labelled as people read them, with a line at 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axis.axhline(1, color=_GREY, linewidth=1.4, linestyle="--", zorder=1.9)


def _speedups(rows: Sequence[Row], where: str) -> Any:
    figure, (over_steps, over_batch) = _figure(2)
    methods = [c for c in rows[0].values if c not in ("steps", "batch", "ordinary_s")]
    longest = max(int(row.values["batch"]) for row in rows)
    at = {int(row.values["steps"]) for row in rows if int(row.values["batch"]) == longest}
    single = [row for row in rows if row.values["batch"] == 1]
    batched = [row for row in rows if row.values["steps"] in at]
    for axis, key, chosen, label in (
        (over_steps, "steps", single, "steps T"),
        (over_batch, "batch", batched, "batch B"),
    ):
        ordered = sorted(chosen, key=lambda row: float(row.values[key]))
        places = [int(row.values[key]) for row in ordered]
        for (colour, marker), method in zip(_STYLES[: len(methods)], methods, strict=True):
            name = _NAMES.get(method, method)
            heights = [float(row.values[method]) for row in ordered]
            axis.plot(places, heights, color=colour, marker=marker, markersize=6, linewidth=1.8, label=name)
        _ticks(axis, places)
        _times(axis)
        axis.set_xlabel(label)
    over_steps.set_ylabel(_YLABEL)
    over_steps.set_title("over the length, B=1")
    over_batch.set_title(f"over the batch, T={', '.join(f'{t:,}' for t in sorted(at))}")
    figure.legend(
        *over_steps.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(methods), 4), frameon=False
    )
    figure.suptitle(f"GRU loop, H=128, tolerance 1e-5, by method ({where})")
    return figure


def _convergence(rows: Sequence[Row], where: str) -> Any:
    problems = list(dict.fromkeys(row.case for row in rows))
    methods = list(dict.fromkeys(re.sub(r", \d+ steps", "", str(row.values["method"])) for row in rows))
    styles = dict(zip(methods, _STYLES, strict=False))
    figure, axes = _figure(len(problems))
    for axis, problem in zip(axes, problems, strict=True):
        chosen = [row for row in rows if row.case == problem]
        sweeps = sorted(int(c) for c in chosen[0].values if c.isdigit())
        for row in chosen:
            name = re.sub(r", \d+ steps", "", str(row.values["method"]))
            colour, marker = styles[name]
            errors = [min(max(float(row.values[str(k)]), _SMALLEST), _LARGEST) for k in sweeps]
            axis.plot(sweeps, errors, color=colour, marker=marker, markersize=5, linewidth=1.8, label=name)
        ordinary = float(chosen[0].values["ordinary_error"])
        axis.axhline(ordinary, color=_GREY, linewidth=1.4, linestyle="--", zorder=1.9, label="the ordinary run's error")
        _ticks(axis, [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= sweeps[-1]])
        axis.set_yscale("log")
        axis.set_ylim(_SMALLEST, _LARGEST)
        axis.set_xlabel("sweeps")
        axis.set_title(problem)
    for axis in axes[::2]:
        axis.set_ylabel("largest error / largest state")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False)
    figure.suptitle(f"Error after each sweep, by method ({where})")
    return figure


def _device(rows: Sequence[Row], where: str) -> Any:
    shapes = {tuple(int(n) for n in re.findall(r"[TB]=(\d+)", row.case)): row for row in rows}
    batches, longest = sorted({batch for _, batch in shapes}), max(steps for steps, _ in shapes)
    columns = (
        ("solved_s", "fxjacobi, tolerance 1e-5"), ("exact_s", "fxjacobi, exact"), ("graphed_s", "eager loop as a CUDA graph"),
        ("reduce_overhead_s", "cell under torch.compile"), ("fused_s", "torch.nn's fused loop"),
    )  # fmt: skip
    panels = [(f"over the length, B={b}", "steps T", {t: r for (t, k), r in shapes.items() if k == b}) for b in batches]
    panels.append((f"over the batch, T={longest:,}", "batch B", {k: r for (t, k), r in shapes.items() if t == longest}))
    figure, axes = _figure(len(panels))
    for axis, (title, label, chosen) in zip(axes, panels, strict=True):
        for (colour, marker), (column, name) in zip(_STYLES, columns, strict=False):
            points = [
                (place, float(row.values["eager_s"]) / float(row.values[column]))
                for place, row in sorted(chosen.items())
                if column in row.values
            ]
            if points:
                places, heights = zip(*points, strict=True)
                axis.plot(places, heights, color=colour, marker=marker, markersize=6, linewidth=1.8, label=name)
        _ticks(axis, sorted(chosen))
        _times(axis)
        axis.set_xlabel(label)
        axis.set_title(title)
    for axis in axes[::2]:
        axis.set_ylabel(_YLABEL)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{rows[0].case.split(',')[0]} loop, H=128 ({where})")
    return figure
