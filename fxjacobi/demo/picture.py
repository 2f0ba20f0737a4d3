"""The demo's picture: the digits drawn both ways, and at which sweep each pixel became final."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fxjacobi.demo.job import Outcome

__all__ = ["draw"]


def draw(outcomes: Sequence[Outcome], out: Path) -> None:
    """Write a picture of ``outcomes`` to ``out``: three lines of images for each. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2 * len(outcomes)), layout="constrained")
    FigureCanvasAgg(figure)
    for part, outcome in zip(figure.subfigures(len(outcomes), 1, squeeze=False)[:, 0], outcomes, strict=True):
        part.suptitle(
            f"{outcome.title}\n{outcome.equations} passes in {outcome.ordinary_s:.3g} s, {outcome.sweeps} sweeps in "
            f"{outcome.solved_s:.3g} s, equal: {'no' if outcome.difference else 'yes'}"
        )
        lines = (
            (f"ordinary run\n{outcome.equations} passes", outcome.ordinary, "gray", 1.0),
            (f"fxjacobi\n{outcome.sweeps} sweeps", outcome.solved, "gray", 1.0),
            ("sweep at which\na pixel became final", outcome.final_at, "viridis", float(outcome.final_at.max())),
        )
        axes = part.subplots(len(lines), len(outcome.ordinary), squeeze=False)
        for row, (label, images, colours, most) in zip(axes, lines, strict=True):
            for axis, image in zip(row, images.to(torch.float32).tolist(), strict=True):
                axis.imshow(image, cmap=colours, vmin=0, vmax=most)
                axis.set_xticks([])
                axis.set_yticks([])
            row[0].set_ylabel(label, rotation=0, ha="right", va="center")
        part.colorbar(axes[-1][0].images[0], ax=axes[-1].tolist(), shrink=0.9)
    figure.savefig(out, dpi=110)
