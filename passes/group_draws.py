"""group_draws: equal draws that follow one another are made by one call, draw by draw, in the same order.

Fires on runs of two or more draws of one operation with the same arguments, no other draw between them::

    before                                   after
    rand = aten.rand([100])                  draws = draw_each(aten.rand, 784, ([100],), {}, filled=False, inside=True)
    rand_1 = aten.rand([100])                rand, rand_1, ... = draws[0], draws[1], ...
    ...

It changes no number: a generator is asked for the same ones in the same order. It saves the way from a graph's node to
the generator, which takes three times as long as a small draw itself. Uniform draws that only blocks read (``inside``)
become one draw, where the generator gives the same numbers so. Must not fire on draws that read a value of the run,
which have a place of their own.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx

from fxjacobi.assemble import assemble, copy_node
from fxjacobi.graph import is_random, site_of, spec_of, stamp
from fxjacobi.ops import draw, draw_each
from fxjacobi.passes.base import Pass, PassResult

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["GroupDraws", "group_draws"]


def _key(node: fx.Node) -> Any:
    return node.target, repr(node.args), repr(node.kwargs)


def _runs(module: fx.GraphModule) -> Iterator[list[fx.Node]]:
    """Yield the longest runs of equal draws."""
    run: list[fx.Node] = []
    for node in module.graph.nodes:
        draws = is_random(node)
        if not draws and node.op != "call_module":
            continue  # it draws nothing
        alone = draws and all(each is node.kwargs.get("generator") for each in node.all_input_nodes)
        if run and not (alone and _key(node) == _key(run[0])):
            yield run
            run = []
        if alone and node.target is not draw_each:
            run.append(node)
    if run:
        yield run


def group_draws(module: fx.GraphModule) -> fx.GraphModule:
    """Return ``module`` with runs of equal draws as one call each, or itself if there is none."""
    runs = {run[0]: run for run in _runs(module) if len(run) > 1}
    if not runs:
        return module
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        run = runs.get(node)
        if run is not None:
            filled = node.target is draw
            op, *args = node.args if filled else (node.target, *node.args)
            call = (op, len(run), tuple(args), fx.map_arg(dict(node.kwargs), values.__getitem__))
            inside = all(user.op == "call_module" for one in run for user in one.users)
            together = graph.call_function(draw_each, call, {"filled": filled, "inside": inside})
            stamp(together, tuple(spec_of(one) for one in run), site_of(node))
            for number, one in enumerate(run):
                part = graph.call_function(operator.getitem, (together, number))
                values[one] = stamp(part, spec_of(one), site_of(one))
        elif node not in values:
            given = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = copy_node(graph, node, *given)
    return assemble(graph, module)


@dataclass(frozen=True)
class GroupDraws(Pass):
    """See the module's docstring."""

    name: ClassVar[str] = "group_draws"

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Group the draws."""
        return PassResult.of(group_draws(module), module)
