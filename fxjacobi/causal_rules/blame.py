"""Finding the operation that broke causality: follow the offending rank back, element by element.

From the value written at step t, walk towards the array: at each node choose an element of an argument that the
offending element depends on and whose rank offends too (found by marking halves of the candidates and applying the rule
again, so no operation needs a rule for it). The operation to blame is the one on the way where the place of the element
jumps ahead in the order of writing; where places cannot be compared (a dense network), the one at which the
offending dependence stands out most from the element's other dependences.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from fxjacobi.causal_rules.domain import NOTHING, Abstract, Value
from fxjacobi.causal_rules.interpreter import evaluate
from fxjacobi.causal_rules.pointwise import is_pointwise
from fxjacobi.causal_rules.registry import Context, tensors_in
from fxjacobi.causal_rules.views import MOVES

if TYPE_CHECKING:
    from torch import fx

    from fxjacobi.array_loop import ArrayLoop

__all__ = ["blame"]


def blame(
    context: Context,
    structure: ArrayLoop,
    env: dict[fx.Node, Value],
    end: fx.Node,
    step: int,
    clock: int,
    rank: int,
) -> fx.Node:
    """Return the node that let ``end`` at ``step`` depend on equation ``rank >= clock``."""
    if context.unknown_ops and rank == context.top:
        return _operation(next(iter(context.unknown_ops)))
    start = _entrance(structure, env, end, step, clock)
    if start is None:
        return _operation(end)
    node, element = start
    probe = Context(
        context.top,
        finite_masks=context.finite_masks,
        may_be_lenient=context.may_be_lenient,
        assumable=context.assumable,
    )
    with probe.within(env):
        trail = _trail(probe, structure, env, node, element, clock)
        return _operation(_culprit(probe, structure, env, trail) or end)


def _operation(node: fx.Node) -> fx.Node:
    """Return what made ``node``: of one result of several, the operation that made them."""
    return node.args[0] if node.target is operator.getitem else node  # type: ignore[return-value]


def _entrance(
    structure: ArrayLoop, env: dict[fx.Node, Value], end: fx.Node, step: int, clock: int
) -> tuple[fx.Node, int] | None:
    """Return where the tail reads an offending element: a node of the network and the element's flat index."""
    for used in structure.uses(end):
        if used in structure.accesses:
            access = structure.accesses[used]
            source = env[access.source]
            if access.source in structure.versions or not isinstance(source, Abstract):
                continue
            here = access.positions[step].reshape(-1)
            offending = (source.rank.reshape(-1)[here] >= clock).nonzero()[:, 0]
            if len(offending):
                return access.source, int(here[offending[0]])
        elif isinstance(env.get(used), Abstract):
            value = env[used]
            assert isinstance(value, Abstract)
            offending = (value.rank.reshape(-1) >= clock).nonzero()[:, 0]
            if len(offending):
                return used, int(offending[0])
    return None


def _trail(
    probe: Context, structure: ArrayLoop, env: dict[fx.Node, Value], node: fx.Node, element: int, clock: int
) -> list[tuple[fx.Node, int, fx.Node, int]]:
    """Return ``(node, element, argument node, its element)`` from the tail's end to the array."""
    trail: list[tuple[fx.Node, int, fx.Node, int]] = []
    while node not in structure.versions:
        if node.op == "call_function" and not isinstance(env.get(node), Abstract):
            break
        before = _before(probe, env, node, element, clock)
        if before is None:
            break
        trail.append((node, element, *before))
        node, element = before
    return trail


def _leaves(node: fx.Node, env: dict[fx.Node, Value]) -> list[fx.Node]:
    return [used for used in node.all_input_nodes if tensors_in(env.get(used))]


def _before(
    probe: Context, env: dict[fx.Node, Value], node: fx.Node, element: int, clock: int
) -> tuple[fx.Node, int] | None:
    """Return an argument of ``node`` and one of its elements, offending too, that ``element`` of it depends on."""
    target = node
    chosen: int | None = None
    if node.target is operator.getitem:
        # A result of several: look through to the operation itself.
        chosen, target = int(node.args[1]), node.args[0]  # type: ignore[arg-type, assignment]
    if target.op != "call_function":
        return None
    for used in _leaves(target, env):
        value = env[used]
        if not isinstance(value, Abstract):
            continue
        offending = (value.rank.reshape(-1) >= clock).nonzero()[:, 0]
        if not len(offending):
            continue
        # Prefer the same place: an operation that looks ahead has no other choice.
        shape = _shape(env, node)
        if value.shape == shape and bool((offending == element).any()):
            own = torch.tensor([element])
            if _reaches(probe, env, target, used, own, element, chosen):
                return used, element
        if not _reaches(probe, env, target, used, offending, element, chosen):
            continue
        low = offending
        while len(low) > 1:
            half = low[: len(low) // 2]
            low = half if _reaches(probe, env, target, used, half, element, chosen) else low[len(low) // 2 :]
        return used, int(low[0])
    return None


def _shape(env: dict[fx.Node, Value], node: fx.Node) -> tuple[int, ...]:
    value = env[node]
    return value.shape if isinstance(value, Abstract) else ()


def _reaches(
    probe: Context,
    env: dict[fx.Node, Value],
    node: fx.Node,
    used: fx.Node,
    marked: torch.Tensor,
    element: int,
    chosen: int | None,
) -> bool:
    """Whether ``element`` of ``node`` depends on any of the ``marked`` elements of its argument ``used``."""
    found = env[used]
    assert isinstance(found, Abstract)
    rank = torch.full((found.rank.numel(),), NOTHING, dtype=torch.int32)
    rank[marked] = 0
    marks = Abstract(rank.reshape(found.shape), found.known, found.value, found.sources)

    def replaced(one: fx.Node) -> Any:
        if one is used:
            return marks
        return tree_map(_unranked, env[one], is_leaf=lambda item: isinstance(item, Abstract))

    args = map_arg(node.args, replaced)
    kwargs = map_arg(node.kwargs, replaced)
    result = evaluate(probe, node, args, kwargs)
    if chosen is not None:
        assert isinstance(result, (tuple, list))
        result = result[chosen]
    return isinstance(result, Abstract) and int(result.rank.reshape(-1)[element]) >= 0


def _unranked(item: object) -> object:
    if not isinstance(item, Abstract):
        return item
    blank = torch.tensor(NOTHING, dtype=torch.int32).expand(item.shape)
    return Abstract(blank, item.known, item.value, item.sources)


def _culprit(
    probe: Context,
    structure: ArrayLoop,
    env: dict[fx.Node, Value],
    trail: list[tuple[fx.Node, int, fx.Node, int]],
) -> fx.Node | None:
    if not trail:
        return None
    # 1. Where the element's place jumps ahead, among tensors laid out like the array.
    order = _order(structure)
    previous: int | None = None
    segment: list[fx.Node] = []
    for node, element, used, inner in trail:
        segment.append(node)
        if previous is None:
            previous = _place(order, env, node, element)
        place = _place(order, env, used, inner)
        if place is None:
            continue
        if previous is not None and place > previous:
            mixing = [one for one in segment if one.target not in MOVES and not is_pointwise(one.target)]
            return (mixing or segment)[-1]
        previous = place
        segment = []
    # 2. Where the offending dependence stands out most; the earliest of equals.
    best: tuple[int, fx.Node] | None = None
    for node, element, used, inner in trail:
        if node.target in MOVES or is_pointwise(node.target):
            continue
        without = _without(probe, env, node, element, used, inner)
        if without is None:
            continue
        value = env[used]
        assert isinstance(value, Abstract)
        gap = int(value.rank.reshape(-1)[inner]) - without
        if best is None or gap >= best[0]:
            best = (gap, node)
    return best[1] if best is not None else trail[-1][0]


def _without(
    probe: Context, env: dict[fx.Node, Value], node: fx.Node, element: int, used: fx.Node, inner: int
) -> int | None:
    """Return the rank that ``element`` of ``node`` would have without element ``inner`` of its argument."""
    target, chosen = node, None
    if node.target is operator.getitem:
        target, chosen = node.args[0], int(node.args[1])  # type: ignore[arg-type, assignment]
    found = env[used]
    assert isinstance(found, Abstract)
    rank = found.rank.reshape(-1).clone()
    rank[inner] = NOTHING
    cut = Abstract(rank.reshape(found.shape), found.known, found.value, found.sources)

    def replaced(one: fx.Node) -> Any:
        return cut if one is used else env[one]

    result = evaluate(probe, target, map_arg(target.args, replaced), map_arg(target.kwargs, replaced))
    if chosen is not None:
        assert isinstance(result, (tuple, list))
        result = result[chosen]
    return int(result.rank.reshape(-1)[element]) if isinstance(result, Abstract) else None


def _order(structure: ArrayLoop) -> tuple[tuple[int, ...], torch.Tensor]:
    """Return the array's dimensions along which the equation varies, and the equation at each place of those."""
    rank = structure.ranks()
    varying = []
    for dim in range(rank.dim()):
        if bool((rank != rank.narrow(dim, 0, 1)).any()):
            varying.append(dim)
    small = rank
    for dim in range(rank.dim()):
        if dim not in varying:
            small = small.narrow(dim, 0, 1)
    return tuple(rank.shape[dim] for dim in varying), small.reshape([rank.shape[dim] for dim in varying])


def _place(
    order: tuple[tuple[int, ...], torch.Tensor],
    env: dict[fx.Node, Value],
    node: fx.Node,
    element: int,
) -> int | None:
    """Return the equation that writes the element's own place, if the tensor is laid out like the array."""
    value = env.get(node)
    sizes, ranks = order
    if not isinstance(value, Abstract) or not sizes:
        return None
    shape = value.shape
    matches = [
        start for start in range(len(shape) - len(sizes) + 1) if tuple(shape[start : start + len(sizes)]) == sizes
    ]
    if len(matches) != 1:
        return None
    index = torch.unravel_index(torch.tensor(element), shape)[matches[0] : matches[0] + len(sizes)]
    return int(ranks[tuple(int(i) for i in index)])
