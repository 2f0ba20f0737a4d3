"""Strategies of what a program does beside computing: writes to its arguments and state, and what it returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

    from fxjacobi.testing.writer import Writer

__all__ = ["draw_argument_write", "draw_number", "draw_return", "draw_state"]


def draw_argument_write(draw: DrawFn, writer: Writer) -> None:
    """Write an in-place change of the sequence or the state that the caller passed."""
    sizes = writer.sizes
    sequence, state = writer.sequences[0], writer.states[0]
    writer.features.add("argument written in place")
    value = draw(st.sampled_from(writer.states))
    forms = [f"{sequence}[:1] = {value}", f"{state}.copy_({value})"]
    if sizes.kind == "bool":
        forms += [f"{state}.logical_not_()", f"{sequence}[:, :1] ^= True"]
    else:
        forms += [f"{state}.mul_(2)", f"{sequence}[:, :1] += 1", f"{sequence}.transpose(0, 1)[:1].neg_()"]
    writer.line(draw(st.sampled_from(forms)))


def draw_number(draw: DrawFn, writer: Writer) -> None:
    """Write a use of a number that Python takes from a tensor."""
    writer.features.add("number from data")
    state = draw(st.sampled_from(writer.states))
    new = writer.name("h")
    if writer.sizes.kind == "bool":
        writer.line(f"{new} = {state} ^ ({state}.sum().item() > 2)")
    elif writer.sizes.kind == "int":
        writer.line(f"{new} = {state} * min({state}.sum().item(), 1)")
    else:
        writer.line(f"{new} = {state} * min({state}.abs().sum().item(), 1.0)")
    writer.states.append(new)


def draw_state(draw: DrawFn, writer: Writer) -> None:
    """Write a change of what the module keeps between calls: a buffer, an attribute, BatchNorm's statistics."""
    sizes = writer.sizes
    state = writer.states[-1]
    forms = ["counter", "attribute"]
    if sizes.kind == "float":
        forms.append("running mean")
        if sizes.batch > 1 and sizes.dtype.itemsize >= 4:
            forms.append("batch norm")
    form = draw(st.sampled_from(forms))
    writer.features |= {"module state", form}
    if form == "counter":
        counter = writer.buffer("torch.zeros((), dtype=torch.int64)")
        writer.line(f"{counter} += 1")
    elif form == "running mean":
        mean = writer.buffer(f"torch.zeros({sizes.hidden}, dtype={sizes.dtype})")
        writer.line(f"{mean}.mul_(0.9).add_({state}.detach().sum(0), alpha=0.1)")
    elif form == "attribute":
        memory = writer.attribute("None")
        writer.line(f"{memory} = {state}.detach()")
    else:
        new = writer.name("h")
        writer.line(f"{new} = {writer.module(f'nn.BatchNorm1d({sizes.hidden}, dtype=DTYPE)')}({state})")
        writer.states.append(new)


def draw_return(draw: DrawFn, writer: Writer) -> None:
    """Write the return statement: a tensor, or tensors nested in containers, some of them views of others."""
    last = writer.states[-1]
    everything = [*reversed(writer.states), *reversed(writer.sequences)]
    other = draw(st.sampled_from(everything))
    forms = {
        "tensor": last,
        "sequence": writer.sequences[-1],
        "tuple": f"({', '.join(everything)},)",
        "list": f"[{last}, {other}]",
        "dict": f'{{"last": {last}, "other": {other}}}',
        "nested": f'({last}, {{"all": [{other}, None], "steps": {writer.sizes.steps}}}, None)',
        "none": "None",
        "same twice": f"({last}, {last}, {other})",
        "view": f"({last}, {last}.t(), {writer.sequences[-1]}[:1])",
        "argument": f"({writer.sequences[0]}, {last})",
        "view of argument": f"({writer.sequences[0]}.transpose(0, 1), {last})",
    }
    # Returning everything keeps every loop alive.
    form = draw(st.sampled_from([*forms, "tuple", "tuple", "tuple"]))
    writer.features.add(f"returns: {form}")
    writer.line(f"return {forms[form]}")
