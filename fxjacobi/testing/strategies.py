"""``programs()``: a Hypothesis strategy of whole PyTorch programs made of loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st

from fxjacobi.testing.effects import draw_argument_write, draw_number, draw_return, draw_state
from fxjacobi.testing.fragments import (
    draw_fixed_point,
    draw_map,
    draw_nested,
    draw_recurrence,
    draw_straight,
    draw_writes,
)
from fxjacobi.testing.program import Layout, Program
from fxjacobi.testing.writer import Sizes, Writer

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

__all__ = ["programs"]

# The simplest first: Hypothesis shrinks towards it.
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float32,
    torch.float32,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
FRAGMENTS = (
    draw_recurrence,
    draw_recurrence,
    draw_map,
    draw_fixed_point,
    draw_writes,
    draw_nested,
    draw_straight,
)


@st.composite
def programs(draw: DrawFn) -> Program:
    """Strategy of programs: up to three loops, with effects, over sequences ``(T, B, H)`` and states ``(B, H)``.

    Loops: recurrences (expressions of one or two past states, ``nn.RNNCell``, ``GRUCell``, ``LSTMCell``, submodules),
    maps, fixed-point repetitions, arrays written position by position, nested layers; 0, 1, 2 and more iterations.
    Per step: literals, parameters, random draws, branches on data, early ends. Around them: float, bfloat16, integer,
    bool and complex dtypes, batch 0, non-contiguous arguments, NaN, infinities, signed zeros and subnormals, arguments
    and buffers written in place, outputs nested in tuples, dicts and ``None``, or aliasing one another.
    Every program runs without an error unless its own data-dependent arithmetic raises one.
    """
    sizes = Sizes(
        steps=draw(st.sampled_from((3, 1, 2, 0, 4, 7, 10))),
        batch=draw(st.sampled_from((2, 1, 3, 0, 5))),
        # 9 and 16 lie on either side of what vector bodies and scalar tails of a row take.
        hidden=draw(st.sampled_from((3, 1, 2, 4, 9, 16))),
        dtype=draw(st.sampled_from(DTYPES)),
    )
    writer = Writer(sizes, modular=draw(st.booleans()))
    writer.features |= {
        str(sizes.dtype).removeprefix("torch."),
        f"batch {sizes.batch if sizes.batch < 2 else 'many'}",
        f"{sizes.steps if sizes.steps < 3 else 'many'} steps",
        "module" if writer.modular else "function",
    }
    for prefix, shape, known in (
        ("x", (sizes.steps, sizes.batch, sizes.hidden), writer.sequences),
        ("c", (sizes.batch, sizes.hidden), writer.states),
    ):
        layout, specials = draw(st.sampled_from(Layout)), draw(_specials(sizes))
        writer.features |= {layout.name.lower()} | ({"special values"} if specials else set())
        known.append(writer.argument(prefix, shape, layout, specials=specials))
    if draw(st.integers(0, 7)) == 7:
        draw_argument_write(draw, writer)
    for _ in range(draw(st.sampled_from((1, 2, 3)))):
        draw(st.sampled_from(FRAGMENTS))(draw, writer)
        if draw(st.integers(0, 9)) == 9:
            draw_argument_write(draw, writer)
    if draw(st.integers(0, 7)) == 7:
        draw_number(draw, writer)
    if writer.modular and draw(st.integers(0, 3)) == 3:
        draw_state(draw, writer)
    draw_return(draw, writer)
    grad = sizes.kind in ("float", "complex") and draw(st.integers(0, 3)) == 3
    if grad:
        writer.features.add("grad")
    return Program(writer.source(), tuple(writer.arguments), frozenset(writer.features), grad, draw(st.integers(0, 99)))


def _specials(sizes: Sizes) -> st.SearchStrategy[tuple[tuple[int, float], ...]]:
    """Strategy of (position, value): for most programs none, for some up to three values that arithmetic treats apart."""
    if sizes.kind not in ("float", "complex"):
        return st.just(())
    tiny = torch.finfo(sizes.dtype).tiny
    values = st.sampled_from((float("nan"), float("inf"), float("-inf"), -0.0, 0.0, tiny, tiny / 4, -tiny / 4, 1e30))
    some = st.lists(st.tuples(st.integers(0, 63), values), min_size=1, max_size=3).map(tuple)
    return st.integers(0, 3).flatmap(lambda choice: some if choice == 3 else st.just(()))
