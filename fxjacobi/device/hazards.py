"""Operations that stop a device for good where a value is out of range: none of them may run on what nobody vouches for.

On the CPU an index out of range is an exception, after which the ordinary run takes over. On a CUDA device it is an
assertion inside a kernel, after which the process can no longer use the device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from fxjacobi.graph import TensorSpec, is_random

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["draws", "indexes_by_guess", "may_assert"]

aten = torch.ops.aten

_INDEX: dict[str, tuple[int, ...]] = {
    "index": (1,), "index_put": (1,), "_unsafe_index": (1,), "index_select": (2,), "gather": (2,), "scatter": (2,),
    "scatter_add": (2,), "scatter_reduce": (2,), "index_add": (2,), "index_copy": (2,), "index_fill": (2,),
    "embedding": (1,), "take": (1,), "put": (1,), "nll_loss_forward": (1,), "nll_loss2d_forward": (1,),
    "_embedding_bag": (1, 2), "_embedding_bag_forward_only": (1, 2),
}  # fmt: skip
"""Where operations take indices, by position of the argument."""

_DOMAIN = frozenset({"multinomial", "bernoulli", "_assert_async", "binary_cross_entropy"})
"""Operations that check their argument's domain on the device."""

_CONVERSIONS = frozenset({"_to_copy", "to", "floor", "ceil", "round", "trunc", "type_as"})


def _name(node: fx.Node) -> str:
    target = node.target
    return target._schema.name.partition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def _calls(module: fx.GraphModule) -> Iterable[tuple[fx.GraphModule, fx.Node]]:
    for node in module.graph.nodes:
        yield module, node
        if node.op == "call_module":
            for inner in module.get_submodule(str(node.target)).modules():
                if isinstance(inner, fx.GraphModule):
                    yield from ((inner, each) for each in inner.graph.nodes)


def may_assert(module: fx.GraphModule) -> bool:
    """Whether some operation of ``module``, or of what it calls, can fail inside a kernel for the values it is given."""
    return any(_name(node) in _INDEX or _name(node) in _DOMAIN for _, node in _calls(module))


def draws(module: fx.GraphModule) -> bool:
    """Whether ``module``, or what it calls, draws random numbers: running it once more would change the caller's sample."""
    return any(is_random(node) for _, node in _calls(module))


def indexes_by_guess(module: fx.GraphModule, guesses: Iterable[fx.Node]) -> str | None:
    """Return the operation of ``module`` that indexes by a number computed from a guess, or ``None``.

    A guess is any value that is not final: finite, of the right dtype, and otherwise anything. An integer that is itself
    a guess is a token that some step wrote, and in range wherever the step's own values are; an integer *made* of a float
    (a conversion, a bucket that a search found) may be anything, unless it is clamped.
    """
    wild: set[fx.Node] = set()
    touched = set(guesses)
    for node in module.graph.nodes:
        if not touched.intersection(node.all_input_nodes):
            continue
        touched.add(node)
        name = _name(node)
        for position in _INDEX.get(name, ()):
            argument = node.args[position] if position < len(node.args) else None
            used = (
                [argument]
                if isinstance(argument, fx.Node)
                else list(argument or ())
                if isinstance(argument, (list, tuple))
                else []
            )
            if wild.intersection(n for n in used if isinstance(n, fx.Node)):
                return f"{node.name} ({name}) indexes by a number made of a guess"
        if node.op == "call_module" and may_assert_inside(module, node):
            return f"{node.name} indexes inside"
        made = name in _CONVERSIONS or name in ("searchsorted", "bucketize")
        if name in ("clamp", "argmax", "argmin", "argsort", "remainder"):
            continue
        if (made and _is_integer(node)) or wild.intersection(node.all_input_nodes):
            wild.add(node)
    return None


def may_assert_inside(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether the submodule that ``node`` calls holds an operation that can fail inside a kernel."""
    inner = module.get_submodule(str(node.target))
    return any(may_assert(each) for each in inner.modules() if isinstance(each, fx.GraphModule))


def _is_integer(node: fx.Node) -> bool:
    spec = node.meta.get("spec")
    return isinstance(spec, TensorSpec) and not spec.dtype.is_floating_point and not spec.dtype.is_complex
