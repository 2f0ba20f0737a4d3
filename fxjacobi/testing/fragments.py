"""Strategies of fragments: one loop, or one effect, written into a program under construction.

A fragment reads the sequences ``(T, B, H)`` and states ``(B, H)`` that the writer knows and adds what it computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from fxjacobi.testing.accesses import draw_access
from fxjacobi.testing.expressions import draw_combination, draw_expression, draw_linear

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

    from fxjacobi.testing.writer import Writer

__all__ = ["draw_fixed_point", "draw_map", "draw_nested", "draw_recurrence", "draw_straight", "draw_writes"]


def _maybe(draw: DrawFn, one_in: int) -> bool:
    return draw(st.integers(0, one_in - 1)) == one_in - 1


def _zeros(writer: Writer, *shape: object) -> str:
    # On the device of the arguments, as a program that runs on any device says it.
    return f"torch.zeros({', '.join(map(str, shape))}, dtype={writer.sizes.dtype}, device={writer.device})"


def _initial(draw: DrawFn, writer: Writer) -> str:
    """Write a new state variable and return its name."""
    state = writer.name("h")
    zeros = _zeros(writer, writer.sizes.batch, writer.sizes.hidden)
    writer.line(f"{state} = {draw(st.sampled_from((zeros, *writer.states)))}")
    return state


def _gather(draw: DrawFn, writer: Writer) -> tuple[str, str, str]:
    """Write what gathers one value a step; return its name, the statement that adds ``{y}`` at ``{t}``, the result."""
    sizes = writer.sizes
    # An empty list can neither be stacked nor concatenated.
    how = draw(st.sampled_from(("stack", "cat", "write", "write batch first"))) if sizes.steps else "write"
    writer.features.add(f"gather by {how.split()[0]}")
    outs = writer.name("outs")
    if how == "write":
        writer.line(f"{outs} = {_zeros(writer, sizes.steps, sizes.batch, sizes.hidden)}")
        return outs, f"{outs}[{{t}}] = {{y}}", outs
    if how == "write batch first":
        writer.line(f"{outs} = {_zeros(writer, sizes.batch, sizes.steps, sizes.hidden)}")
        return outs, f"{outs}[:, {{t}}] = {{y}}", f"{outs}.transpose(0, 1)"
    writer.line(f"{outs} = []")
    if how == "stack":
        return outs, f"{outs}.append({{y}})", f"torch.stack({outs})"
    return outs, f"{outs}.append(({{y}}).unsqueeze(0))", f"torch.cat({outs}, dim=0)"


def _finish_gather(writer: Writer, result: str) -> None:
    sequence = writer.name("seq")
    writer.line(f"{sequence} = {result}")
    writer.sequences.append(sequence)


def _condition(draw: DrawFn, writer: Writer, state: str) -> str:
    """Return a condition on the values of ``state``."""
    kind = writer.sizes.kind
    if kind == "bool":
        return f"{state}.all()"
    if kind == "int":
        return f"{state}.sum() % 2 == 0"
    return f"{state}.abs().sum() > {draw(st.sampled_from(('1.0', '4.0', '0.0')))}"


def _random(draw: DrawFn, writer: Writer, state: str) -> str:
    """Return ``state`` changed by a random draw."""
    kind = writer.sizes.kind
    writer.features.add("random")
    if kind == "bool":
        return f"{state} ^ (torch.rand({state}.shape, device={state}.device) < 0.5)"
    if kind == "int":
        return f"{state} + torch.randint_like({state}, 5)"
    forms = [f"{state} + 0.1 * torch.randn_like({state})"]
    if kind == "float":
        forms.append(f"F.dropout({state}, 0.5, training=True)")
        forms.append(f"{state} * torch.bernoulli(torch.sigmoid(torch.nan_to_num({state})))")
        if writer.sizes.batch:
            weights = f"torch.softmax(torch.nan_to_num({state}).clamp(-5, 5).float(), -1)"
            forms.append(f"{state} + torch.multinomial({weights}, 1).to({state}.dtype)")
    return draw(st.sampled_from(forms))


def _literal(draw: DrawFn, writer: Writer, state: str, step: str) -> str:
    """Return ``state`` combined with a literal that differs from step to step."""
    writer.features.add("per-step literal")
    if writer.sizes.kind == "bool":
        return f"{state} ^ ({step} % 2 == 0)"
    if writer.sizes.kind == "int":
        return f"{state} + {step}"
    return draw(st.sampled_from((f"{state} * (0.5 + 0.1 * {step})", f"{state} + 0.1 * {step}")))


def _extras(draw: DrawFn, writer: Writer, state: str, step: str) -> None:
    """Write up to four further statements of a step: a literal, a draw, a branch, an early end."""
    if _maybe(draw, 4):
        writer.line(f"{state} = {_literal(draw, writer, state, step)}")
    if _maybe(draw, 6):
        writer.line(f"{state} = {_random(draw, writer, state)}")
    if _maybe(draw, 6):
        writer.features.add("branch on data")
        with writer.block(f"if {_condition(draw, writer, state)}:"):
            writer.line(f"{state} = {draw_expression(draw, writer, [state], 1)}")


def _early_break(draw: DrawFn, writer: Writer, state: str) -> None:
    if _maybe(draw, 8):
        writer.features.add("early break")
        with writer.block(f"if {_condition(draw, writer, state)}:"):
            writer.line("break")


def draw_recurrence(draw: DrawFn, writer: Writer) -> None:
    """Write ``h_t = f(h_{t-1}, h_{t-2}, x_t, t)``, with a map before, a map after and its outputs gathered."""
    sizes = writer.sizes
    access = draw_access(draw, writer, draw(st.sampled_from(writer.sequences)))
    cells = ["expression", "two back"]
    if sizes.kind == "float" and writer.modular:
        cells += ["RNNCell", "GRUCell", "LSTMCell", "submodule"]
    cell = draw(st.sampled_from(cells))
    writer.features.add(cell)
    state = _initial(draw, writer)
    other = _initial(draw, writer) if cell in ("two back", "LSTMCell") else None
    gathers = draw(st.booleans())
    _, add, result = _gather(draw, writer) if gathers else ("", "", "")
    with writer.block(access.header):
        value = writer.name("u")
        writer.line(f"{value} = {access.element}")
        if draw(st.booleans()):
            writer.line(f"{value} = {draw_expression(draw, writer, [value, *writer.states[:1]])}")
        _write_cell(draw, writer, cell, value, state, other)
        _extras(draw, writer, state, access.step)
        if gathers:
            output = draw_expression(draw, writer, [state, value]) if draw(st.booleans()) else state
            writer.line(add.format(y=output, t=access.step))
        _early_break(draw, writer, state)
    writer.states.append(state)
    if gathers:
        _finish_gather(writer, result)


def _write_cell(draw: DrawFn, writer: Writer, cell: str, value: str, state: str, other: str | None) -> None:
    hidden = writer.sizes.hidden
    if cell == "expression":
        writer.line(f"{state} = {draw_combination(draw, writer, [state, value])}")
    elif cell == "two back":
        writer.line(f"{state}, {other} = {draw_combination(draw, writer, [state, str(other), value])}, {state}")
    elif cell == "submodule":
        bias = draw(st.booleans())
        linear = f"nn.Linear({hidden}, {hidden}, dtype=DTYPE"
        layers = f"{linear}, bias={bias}), nn.Tanh(), {linear})"
        net = writer.module(f"nn.Sequential({layers})")
        writer.line(f"{state} = {net}({state} + {value})")
    elif cell == "LSTMCell":
        name = writer.module(f"nn.LSTMCell({hidden}, {hidden}, dtype=DTYPE)")
        writer.line(f"{state}, {other} = {name}({value}, ({state}, {other}))")
    else:
        name = writer.module(f"nn.{cell}({hidden}, {hidden}, dtype=DTYPE)")
        writer.line(f"{state} = {name}({value}, {state})")


def draw_map(draw: DrawFn, writer: Writer) -> None:
    """Write ``y_t = g(x_t)``: independent steps, with one head for all or one head a step."""
    sizes = writer.sizes
    writer.features.add("map")
    access = draw_access(draw, writer, draw(st.sampled_from(writer.sequences)))
    heads = ""
    if writer.modular and sizes.kind == "float" and draw(st.booleans()):
        writer.features.add("per-step parameters")
        layer = f"nn.Linear({sizes.hidden}, {sizes.hidden}, dtype=DTYPE)"
        heads = writer.module(f"nn.ModuleList([{layer} for _ in range({sizes.steps})])")
    _, add, result = _gather(draw, writer)
    with writer.block(access.header):
        value = writer.name("u")
        writer.line(f"{value} = {access.element}")
        if heads:
            writer.line(f"{value} = {heads}[{access.step}]({value})")
        writer.line(f"{value} = {draw_expression(draw, writer, [value, *writer.states[:1]])}")
        _extras(draw, writer, value, access.step)
        writer.line(add.format(y=value, t=access.step))
    _finish_gather(writer, result)


def draw_fixed_point(draw: DrawFn, writer: Writer) -> None:
    """Write ``z = f(z, c)`` repeated: a triangular system, a value of period 2, or anything; or until it settles."""
    sizes = writer.sizes
    writer.features.add("fixed point")
    constant = draw(st.sampled_from(writer.states))
    state = _initial(draw, writer)
    forms = {
        "float": ["triangular", "period 2", "any"],
        "complex": ["triangular", "period 2", "any"],
        "int": ["modulo", "period 2", "any"],
        "bool": ["any"],
    }[sizes.kind]
    form = draw(st.sampled_from(forms))
    if form == "triangular":
        weight = writer.argument("w", (sizes.hidden, sizes.hidden), scale=0.7)
        step = f"{constant} + {state} @ torch.triu({weight}, 1)"
    elif form == "period 2":
        writer.features.add("period 2")
        step = f"{constant} - {state}"
    elif form == "modulo":
        step = f"({state} * 3 + {constant}) % 5"
    else:
        step = draw_combination(draw, writer, [state, constant])
    repeats = draw(st.sampled_from((0, 1, 2, 5, 12)))
    writer.features.add(f"{repeats if repeats < 3 else 'many'} repetitions")
    if sizes.kind in ("float", "complex") and _maybe(draw, 4):
        writer.features.add("until it settles")
        error, count = writer.name("error"), writer.name("n")
        writer.line(f"{error}, {count} = 1.0, 0")
        with writer.block(f"while {error} > 1e-3 and {count} < {repeats}:"):
            new = writer.name("new")
            writer.line(f"{new} = {step}")
            writer.line(f"{error} = ({new} - {state}).abs().sum().item()")
            writer.line(f"{state}, {count} = {new}, {count} + 1")
    else:
        _repeat(draw, writer, state, step, repeats)
    writer.states.append(state)


def _repeat(draw: DrawFn, writer: Writer, state: str, step: str, repeats: int) -> None:
    iterates = writer.name("iterates") if repeats and _maybe(draw, 3) else ""
    total = writer.name("total") if _maybe(draw, 3) else ""
    if iterates:
        writer.features.add("list of iterates")
        writer.line(f"{iterates} = []")
    if total:
        writer.features.add("sum over iterates")
        writer.line(f"{total} = {state}")
    with writer.block(f"for _ in range({repeats}):"):
        writer.line(f"{state} = {step}")
        if iterates:
            writer.line(f"{iterates}.append({state})")
        if total:
            writer.line(f"{total} = {total} {'^' if writer.sizes.kind == 'bool' else '+'} {state}")
        _early_break(draw, writer, state)
    if iterates:
        writer.line(f"{state} = torch.stack({iterates})[-1]")
    if total:
        writer.states.append(total)


def draw_writes(draw: DrawFn, writer: Writer) -> None:
    """Write an array position by position, each from the array as it is: causally, or not."""
    sizes = writer.sizes
    writer.features.add("writes")
    array, step = writer.name("array"), writer.name("t")
    if sizes.kind == "float" and draw(st.booleans()):
        writer.features.add("autoregressive")
        noise = draw(st.sampled_from(writer.states))
        weight = writer.argument("w", (sizes.hidden, sizes.hidden), scale=0.7)
        diagonal = draw(st.sampled_from((1, 1, 0)))
        writer.line(f"{array} = {_zeros(writer, sizes.batch, sizes.hidden)}")
        with writer.block(f"for {step} in range({sizes.hidden}):"):
            logits = writer.name("logits")
            writer.line(f"{logits} = torch.tanh({array} @ torch.triu({weight}, {diagonal}))")
            value = f"{logits}[:, {step}] + {noise}[:, {step}]"
            if _maybe(draw, 4):
                writer.features.add("random")
                value += f" + 0.1 * torch.randn({sizes.batch}, dtype={sizes.dtype}, device={writer.device})"
            writer.line(f"{array}[:, {step}] = {value}")
        writer.states.append(array)
        return
    sequence = draw(st.sampled_from(writer.sequences))
    start = draw(st.sampled_from(writer.states))
    writer.line(f"{array} = {draw(st.sampled_from((_zeros(writer, *_shape(writer)), f'{sequence}.clone()')))}")
    with writer.block(f"for {step} in range({sizes.steps}):"):
        before = writer.name("before")
        writer.line(f"{before} = {array}[{step} - 1] if {step} else {start}")
        writer.line(f"{array}[{step}] = {draw_combination(draw, writer, [before, f'{sequence}[{step}]'])}")
    writer.sequences.append(array)


def _shape(writer: Writer) -> tuple[int, int, int]:
    return writer.sizes.steps, writer.sizes.batch, writer.sizes.hidden


def draw_nested(draw: DrawFn, writer: Writer) -> None:
    """Write stacked layers over a sequence, in either loop order, each layer with parameters of its own."""
    sizes = writer.sizes
    writer.features.add("nested loops")
    layers = draw(st.sampled_from((1, 2, 3)))
    sequence = draw(st.sampled_from(writer.sequences))
    zeros = _zeros(writer, sizes.batch, sizes.hidden)
    layer, step, value = writer.name("layer"), writer.name("t"), writer.name("v")
    if writer.modular and sizes.kind == "float":
        cell = draw(st.sampled_from(("RNNCell", "GRUCell")))
        writer.features.update((cell, "per-step parameters"))
        one = f"nn.{cell}({sizes.hidden}, {sizes.hidden}, dtype=DTYPE)"
        update = f"{writer.module(f'nn.ModuleList([{one} for _ in range({layers})])')}[{layer}]({{x}}, {{h}})"
    else:
        # Only the names are placeholders here: what was drawn holds no brace of its own.
        update = draw_combination(draw, writer, ["(X)", "(H)"]).replace("(X)", "{x}").replace("(H)", "{h}")
    outs = writer.name("outs")
    if draw(st.booleans()):
        writer.features.add("layers outside")
        current, state = writer.name("seq"), writer.name("h")
        writer.line(f"{current} = {sequence}")
        with writer.block(f"for {layer} in range({layers}):"):
            writer.line(f"{state}, {outs} = {zeros}, []")
            with writer.block(f"for {step} in range({sizes.steps}):"):
                writer.line(f"{state} = {update.format(x=f'{current}[{step}]', h=state)}")
                writer.line(f"{outs}.append({state})")
            writer.line(f"{current} = torch.stack({outs}) if {outs} else {current}")
        writer.states.append(state)
        writer.sequences.append(current)
        return
    writer.features.add("layers inside")
    states = writer.name("hs")
    writer.line(f"{states} = [{zeros} for _ in range({layers})]")
    with writer.block(f"for {step} in range({sizes.steps}):"):
        writer.line(f"{value} = {sequence}[{step}]")
        with writer.block(f"for {layer} in range({layers}):"):
            writer.line(f"{states}[{layer}] = {value} = {update.format(x=value, h=f'{states}[{layer}]')}")
    last = writer.name("h")
    writer.line(f"{last} = {states}[-1]")
    writer.states.append(last)


def draw_straight(draw: DrawFn, writer: Writer) -> None:
    """Write one statement outside any loop."""
    writer.features.add("straight")
    state = writer.name("h")
    if writer.sizes.kind == "float" and draw(st.booleans()):
        writer.line(f"{state} = {draw_linear(draw, writer, draw(st.sampled_from(writer.states)))}")
    else:
        writer.line(f"{state} = {draw_expression(draw, writer, writer.states)}")
    writer.states.append(state)
