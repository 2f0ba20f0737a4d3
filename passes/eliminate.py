"""Drop what nobody reads, and compute what is computed twice once."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi.assemble import assemble, copy_node
from fxjacobi.graph import TensorSpec, is_random
from fxjacobi.loops import Loop
from fxjacobi.ops import GUARDS
from fxjacobi.passes.base import Pass, PassResult
from fxjacobi.passes.escaping import escaping
from fxjacobi.tape import FREE, literal_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

    from fxjacobi.graph import Spec

__all__ = ["Eliminate", "eliminate"]


_PARTS = (torch.ops.aten.select.int, torch.ops.aten.slice.Tensor, operator.getitem)

_ROUNDS = 8  # two are nearly always enough; a bound, whatever the order of nodes does


@dataclass(frozen=True)
class Eliminate(Pass):
    """Eliminate common subexpressions and dead code, in loop bodies and recorded submodules too.

    Two nodes are one if they run the same operation on the same nodes and on literals of equal type and bits (``1``,
    ``1.0`` and ``True`` differ, and so do ``0.0`` and ``-0.0``; NaN equals NaN). Must not fire on random draws, which
    advance the generator, on guards, or on two nodes whose memory the caller sees. Placeholders stay. What was computed
    more than once from placeholders and attributes alone, and the views of attributes that many use (a weight's
    transpose, a mask), moves to the front, so that the first iteration of a loop is like the others; and so that the
    last one is, ``keep_iterations`` keeps dead code while the same place in the user's code has computed the same kind
    of value alive elsewhere (:mod:`fxjacobi.passes.roll_loops` drops it).
    """

    name = "eliminate"
    keep_iterations: bool = True

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Merge forwards, then keep what outputs, guards and draws need."""
        result = module
        for _ in range(_ROUNDS):  # what moved to the front may have made its users repeated
            eliminator = _Eliminator(keep_iterations=self.keep_iterations)
            result = eliminator.run(result)
            if eliminator.settled:
                break
        return PassResult.of(result, module)


def eliminate(module: fx.GraphModule, *, keep_iterations: bool = True) -> fx.GraphModule:
    """Return ``module`` without dead and repeated nodes (see :class:`Eliminate`); ``module`` itself if it has none."""
    return _Eliminator(keep_iterations=keep_iterations).run(module)


def _kind(spec: Spec) -> Any:
    """What of a spec iterations share."""
    return spec.shape if isinstance(spec, TensorSpec) else type(spec)


def _without_spares(parts: list[fx.Node], needed: set[fx.Node]) -> list[fx.Node]:
    """Return ``parts``, or where each whole has one that is needed, these: ``h.chunk(n, 1)[t]`` reads another at each step."""
    count = Counter(part.args[0] for part in parts if part in needed)
    if not count or max(count.values()) > 1 or len(count) == len(parts):
        return parts
    first = {part.args[0]: part for part in reversed(parts)}
    return [part for part in parts if part in needed or (part.args[0] not in count and first[part.args[0]] is part)]


class _Eliminator:
    """Rewrites each submodule once, however often it is called."""

    def __init__(self, *, keep_iterations: bool) -> None:
        self.keep_iterations = keep_iterations
        self.settled = True  # nothing was merged or moved, in any graph: there is nothing that another round would see
        self.submodules: dict[nn.Module, nn.Module] = {}
        self.effects: dict[nn.Module, bool] = {}

    def run(self, module: fx.GraphModule) -> fx.GraphModule:
        """Rewrite one graph."""
        nodes = list(module.graph.nodes)
        new: dict[str, nn.Module] = {}
        changed = False
        effects: set[fx.Node] = set()
        called: dict[Any, nn.Module] = {}  # a recorded submodule is called many times
        for node in nodes:
            if node.op == "call_module":
                submodule = called.get(node.target)
                if submodule is None:
                    submodule = called[node.target] = module.get_submodule(str(node.target))
                    new[str(node.target)] = result = self.submodule(submodule)
                    changed |= result is not submodule
                if self.has_effects(submodule):
                    effects.add(node)
            elif node.op in ("placeholder", "output") or is_random(node) or node.target in GUARDS:
                effects.add(node)
        same = self.merge(module.graph, called, nodes, effects)
        live = self.alive(nodes, same, effects)
        ordered = self.ordered(nodes, same)
        self.settled &= not same and ordered == nodes
        if not changed and len(live) == len(nodes) and ordered == nodes:
            return module
        nodes = ordered
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}

        def value(node: fx.Node) -> fx.Node:
            return values[same.get(node, node)]

        for node in nodes:
            if node in live:
                args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
                values[node] = copy_node(graph, node, args, kwargs)
        return assemble(graph, module, new)

    @staticmethod
    def merge(
        old: fx.Graph, called: dict[Any, nn.Module], nodes: list[fx.Node], effects: set[fx.Node]
    ) -> dict[fx.Node, fx.Node]:
        """Map each node that repeats an earlier one to that one; ``called`` are the graph's submodules."""
        shown = escaping(old)
        first: dict[Any, fx.Node] = {}
        same: dict[fx.Node, fx.Node] = {}

        def key(value: Any) -> Any:
            if isinstance(value, fx.Node):
                return same.get(value, value)
            if isinstance(value, (list, tuple)):
                # Nodes first: they are most of what there is, and a call for each takes longest of all here.
                return (tuple, *[same.get(v, v) if type(v) is fx.Node else key(v) for v in value])
            if isinstance(value, dict):
                return (dict, *((name, key(item)) for name, item in value.items()))
            if isinstance(value, slice):
                return slice, key((value.start, value.stop, value.step))
            return literal_key(value)

        for node in nodes:
            if node in effects:
                continue
            target = called[node.target] if node.op == "call_module" else node.target
            identity = (node.op, target, key(node.args), key(node.kwargs) if node.kwargs else None)
            earlier = first.setdefault(identity, node)
            if earlier is not node and not (node in shown and earlier in shown):
                same[node] = earlier
                if node in shown:  # so is the one that takes its place: a third result may not join them
                    shown.add(earlier)
        return same

    def alive(self, nodes: list[fx.Node], same: dict[fx.Node, fx.Node], effects: set[fx.Node]) -> set[fx.Node]:
        """What outputs, guards and draws need, with its siblings in other iterations if those are kept."""
        siblings: dict[Any, list[fx.Node]] = defaultdict(list)
        place: dict[fx.Node, Any] = {}
        if self.keep_iterations:
            for node in nodes:
                site = node.meta.get("site")
                if node.op == "call_function" and site is not None and node not in same:
                    takes = (
                        argument.target if argument.op == "call_function" else None for argument in node.all_input_nodes
                    )
                    place[node] = key = (node.target, site.file, site.line, _kind(node.meta["spec"]), *takes)
                    siblings[key].append(node)
        needed = self.needed(same, effects) if siblings else set[fx.Node]()
        for key, group in siblings.items():
            if key[0] in _PARTS:
                siblings[key] = _without_spares(group, needed)
        return self.needed(same, effects, lambda node: siblings.pop(place[node], ()) if node in place else ())

    @staticmethod
    def needed(
        same: dict[fx.Node, fx.Node],
        effects: set[fx.Node],
        with_it: Callable[[fx.Node], Iterable[fx.Node]] = lambda _: (),
    ) -> set[fx.Node]:
        """What outputs, guards and draws need, and what stays ``with_it``."""
        found: set[fx.Node] = set()
        waiting = list(effects)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting.extend(same.get(argument, argument) for argument in node.all_input_nodes)
                waiting.extend(with_it(node))
        return found

    @staticmethod
    def ordered(nodes: list[fx.Node], same: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        """``nodes`` with those first that serve many and need nothing that is computed later."""
        repeated = set(same.values())
        constants = dict.fromkeys(node for node in nodes if node.op == "get_attr")  # in order: plans are compared
        early: dict[fx.Node, None] = dict.fromkeys(n for n in nodes if n.op == "placeholder")
        early.update(constants)
        for node in nodes:
            if node in same or node.op != "call_function" or node.target in GUARDS or is_random(node):
                continue
            inputs = [same.get(argument, argument) for argument in node.all_input_nodes]
            if node in repeated:
                moves = all(argument in early for argument in inputs)
            else:
                cheap = node.target in FREE and len(node.users) > 1
                moves = cheap and all(argument in constants for argument in inputs)
            if moves:
                early[node] = None
                if all(argument in constants for argument in inputs):
                    constants[node] = None
        return [*early, *(node for node in nodes if node not in early)]

    def has_effects(self, module: nn.Module) -> bool:
        """Whether running ``module`` draws random numbers or checks a guard."""
        if module not in self.effects:
            graph_module = module.body if isinstance(module, Loop) else module
            self.effects[module] = not isinstance(graph_module, fx.GraphModule) or any(
                is_random(node)
                or node.target in GUARDS
                or (node.op == "call_module" and self.has_effects(graph_module.get_submodule(str(node.target))))
                for node in graph_module.graph.nodes
            )
        return self.effects[module]

    def submodule(self, module: nn.Module) -> nn.Module:
        """The rewritten form of a submodule."""
        if module not in self.submodules:
            result = module
            if isinstance(module, fx.GraphModule):
                result = self.run(module)
            elif type(module) is Loop:
                body = self.run(module.body)
                if body is not module.body:
                    result = Loop(body, module.trip_count, module.bindings, module.results)
            self.submodules[module] = self.submodules[result] = result
        return self.submodules[module]
