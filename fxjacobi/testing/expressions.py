"""Strategies of expressions: what a cell computes from its state and its inputs, shape ``(B, H)`` to ``(B, H)``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypothesis.strategies import DrawFn

    from fxjacobi.testing.writer import Writer

__all__ = ["draw_combination", "draw_expression", "draw_linear"]

UNARY = {
    "float": (
        "torch.tanh({0})",
        "torch.sigmoid({0})",
        "torch.relu({0})",
        "torch.sin({0})",
        "torch.exp(torch.clamp({0}, max=2.0))",
        "F.softplus({0})",
        "F.silu({0})",
        "F.gelu({0})",
        "F.elu({0})",
        "F.softmax({0}, dim=-1)",
        "torch.sqrt(torch.abs({0}))",
        "({0}).cumsum(-1)",
        "({0}).flip(-1)",
        "(-{0})",
        "F.layer_norm({0}, ({0}).shape[-1:])",
        "({0} - ({0}).mean(-1, keepdim=True))",
    ),
    "int": (
        "(-{0})",
        "torch.abs({0})",
        "torch.clamp({0}, -5, 5)",
        "({0} % 7)",
        "({0} // 3)",
        "({0}).cumsum(-1)",
        "({0}).roll(1, -1)",
        "(~{0})",
    ),
    "bool": (
        "(~{0})",
        "torch.logical_not({0})",
        "({0}).roll(1, -1)",
        "({0}).flip(-1)",
        "({0} | ({0}).any(-1, keepdim=True))",
        "({0} ^ ({0}).all(-1, keepdim=True))",
    ),
    "complex": (
        "(-{0})",
        "({0} * 0.5j)",
        "torch.tanh({0})",
        "({0}).conj()",
        "torch.conj({0}).resolve_conj()",
        "({0}).flip(-1)",
        "torch.complex(({0}).imag, ({0}).real)",
    ),
}
BINARY = {
    "float": (
        "({0} + {1})",
        "({0} - {1})",
        "({0} * {1})",
        "({0} / (1.0 + torch.abs({1})))",
        "torch.maximum({0}, {1})",
        "torch.where({0} > {1}, {0}, {1} * 0.5)",
        "torch.addcmul({0}, {1}, {0}, value=0.1)",
        "torch.lerp({0}, {1}, 0.25)",
    ),
    "int": (
        "({0} + {1})",
        "({0} - {1})",
        "({0} * {1}) % 11",
        "torch.minimum({0}, {1})",
        "({0} & {1})",
        "({0} ^ {1})",
        "torch.where({0} > {1}, {0}, {1})",
    ),
    "bool": ("({0} & {1})", "({0} | {1})", "({0} ^ {1})", "torch.where({0}, {1}, ~{1})", "({0} == {1})"),
    "complex": ("({0} + {1})", "({0} - {1})", "({0} * {1})", "torch.where(({0}).real > 0, {0}, {1})"),
}
LITERALS = {
    "float": ("0.5", "-0.1", "1.0", "2", "1e-3"),
    "int": ("2", "-1", "3"),
    "bool": ("True", "False"),
    "complex": ("0.5", "(0.3+0.1j)", "2"),
}


def draw_linear(draw: DrawFn, writer: Writer, operand: str) -> str:
    """Return ``operand`` multiplied by an ``(H, H)`` matrix: a layer's parameter, or an argument."""
    hidden = writer.sizes.hidden
    writer.features.add("linear")
    if writer.modular and draw(st.booleans()):
        bias = draw(st.booleans())
        return f"{writer.module(f'nn.Linear({hidden}, {hidden}, bias={bias}, dtype=DTYPE)')}({operand})"
    weight = writer.argument("w", (hidden, hidden), scale=0.4)
    return f"({operand}) @ {weight}"


def draw_combination(draw: DrawFn, writer: Writer, operands: Sequence[str]) -> str:
    """Return an expression that uses every one of ``operands``."""
    kind = writer.sizes.kind
    result = draw_expression(draw, writer, operands[:1], 1)
    for operand in operands[1:]:
        result = draw(st.sampled_from(BINARY[kind])).format(result, draw_expression(draw, writer, [operand], 1))
    return draw(st.sampled_from(("{0}", *UNARY[kind]))).format(result)


def draw_expression(draw: DrawFn, writer: Writer, leaves: Sequence[str], depth: int = 2) -> str:
    """Return an expression over ``leaves``, each a state of the program's dtype; it uses at least one of them."""
    kind = writer.sizes.kind
    if depth == 0:
        return draw(st.sampled_from(leaves))
    # The simplest first: Hypothesis shrinks towards it.
    form = draw(st.sampled_from(("leaf", "binary", "unary", "literal", "linear")))
    if form == "leaf":
        return draw(st.sampled_from(leaves))
    first = draw_expression(draw, writer, leaves, depth - 1)
    if form == "unary":
        return draw(st.sampled_from(UNARY[kind])).format(first)
    if form == "literal":
        operator = "^" if kind == "bool" else draw(st.sampled_from("+*"))
        return f"({first} {operator} {draw(st.sampled_from(LITERALS[kind]))})"
    if form == "linear" and kind in ("float", "complex"):
        return draw_linear(draw, writer, first)
    return draw(st.sampled_from(BINARY[kind])).format(first, draw_expression(draw, writer, leaves, depth - 1))
