"""Strategies of how a loop reads a sequence ``(T, B, H)``: by index, by iteration, unbound, reversed, by a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypothesis import strategies as st

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

    from fxjacobi.testing.writer import Writer

__all__ = ["Access", "draw_access"]


@dataclass(frozen=True)
class Access:
    """A loop over a sequence.

    Args:
        header: The ``for`` statement.
        element: Expression of the element, ``(B, H)``, that the step reads.
        step: Name of the step's number, ``0 .. T-1``.
    """

    header: str
    element: str
    step: str


def draw_access(draw: DrawFn, writer: Writer, sequence: str) -> Access:
    """Write what must stand before the loop, and return the loop over ``sequence``."""
    steps = writer.sizes.steps
    step = writer.name("t")
    styles = ["index", "select", "unbind", "enumerate", "batch first", "reversed", "slice"]
    if steps:
        styles += ["shifted", "table"]
    style = draw(st.sampled_from(styles))
    writer.features.add(f"access: {style}")
    header = f"for {step} in range({draw(st.sampled_from((str(steps), f'{sequence}.shape[0]')))}):"
    if style == "select":
        return Access(header, f"{sequence}.select(0, {step})", step)
    if style == "unbind":
        parts = writer.name("parts")
        writer.line(f"{parts} = {sequence}.unbind(0)")
        return Access(header, f"{parts}[{step}]", step)
    if style == "enumerate":
        item = writer.name("item")
        return Access(f"for {step}, {item} in enumerate({sequence}):", item, step)
    if style == "batch first":
        swapped = writer.name("swapped")
        writer.line(f"{swapped} = {sequence}.transpose(0, 1)")
        return Access(header, f"{swapped}[:, {step}]", step)
    if style == "reversed":
        if draw(st.booleans()):
            return Access(f"for {step} in reversed(range({steps})):", f"{sequence}[{step}]", step)
        return Access(header, f"{sequence}[{steps} - 1 - {step}]", step)
    if style == "slice":
        return Access(header, f"{sequence}[{step} : {step} + 1].squeeze(0)", step)
    if style == "shifted":
        return Access(header, f"{sequence}[max({step} - 1, 0)]", step)
    if style == "table":
        order = writer.name("order")
        writer.line(f"{order} = {draw(st.permutations(range(steps)))}")
        return Access(header, f"{sequence}[{order}[{step}]]", step)
    return Access(header, f"{sequence}[{step}]", step)
