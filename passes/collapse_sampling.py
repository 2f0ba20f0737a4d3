"""collapse_sampling: a loop that fills an array from a causal network of that array becomes Jacobi sweeps.

Fires on a loop that carries an array that each step writes in part, where every value written is proven to
depend on values written before it only (:mod:`fxjacobi.causality`)::

    before                                              after
    recurrence_1 = self.recurrence_1(x0, w, noise)      the same call, of a JacobiWrites:
                                                        x = write(x0, tail_t(network(x)) for all t), until nothing changes

Must not fire where the proof fails (the loop stays, and its reason says which element and operation broke it), where
the body draws random numbers, carries another array, or writes to places that depend on data. Small values that a step
hands to the next beside the array are carried by the tail, in order. Parameters are taken to be unknown first, so that
training does not void the proof; their zeros are read where masks alone do not suffice.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import torch
from torch import fx, nn

from fxjacobi import ops
from fxjacobi.assemble import assemble
from fxjacobi.causal_rules.domain import Value, constant
from fxjacobi.causal_rules.interpreter import interpret
from fxjacobi.causal_rules.registry import Context, fill
from fxjacobi.causality import CausalityProof, Refusal, prove
from fxjacobi.device.hazards import indexes_by_guess
from fxjacobi.graph import spec_of
from fxjacobi.loops import Loop, Table
from fxjacobi.passes.base import Pass, PassResult
from fxjacobi.passes.batch_tail import batch_tail
from fxjacobi.passes.replace_blocks import replace_blocks
from fxjacobi.rule_table import overloads
from fxjacobi.sampling import JacobiWrites
from fxjacobi.tail_layouts import layout_matters, others_matter, packed
from fxjacobi.unplaced_writes import unplaced_write
from fxjacobi.unroll_inner import unroll_inner

__all__ = ["CollapseSampling"]

_log = logging.getLogger(__name__)

_WRITES = frozenset([ops.write, *overloads("select_scatter", "slice_scatter", "index_put")])

_WINDOW = 64
"""Steps of a window that was asked for without its size."""


@dataclass(frozen=True)
class CollapseSampling(Pass):
    """See the module's docstring.

    Args:
        window: Update only so many steps at a time (GS-Jacobi); ``None``: all.
        windowed: Use a window of the default size, a quarter of the steps or 64, where none is given.
        exact: Whether the tail's equations, run batched, must have the bits of the single steps.
        collapse: Whether to collapse at all, or to say only that it was not asked for.
        measure: Leave final samples out of later sweeps only where it is measured to be faster.
        memory_limit: Bytes that the tail of one sweep may allocate; the window is made to fit.
    """

    name: ClassVar[str] = "collapse_sampling"
    window: int | None = None
    windowed: bool = False
    exact: bool = True
    collapse: bool = True
    measure: bool = True
    memory_limit: int | None = None

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Replace every loop that is proven causal."""
        return replace_blocks(module, lambda loop, node: self._collapse(module, loop, node))

    def _collapse(self, module: fx.GraphModule, loop: Loop, node: fx.Node) -> nn.Module:
        rolled, loop = loop, unroll_inner(loop)
        if not any(inner.target in _WRITES for inner in loop.body.graph.nodes):
            reason = unplaced_write(loop)
            return rolled.with_reason(f"not collapsed: {reason}") if reason else rolled
        if not self.collapse:
            return rolled.with_reason("not collapsed: the ordinary order was asked for")
        loop = packed(loop, node.args)
        top_level = node.graph is module.graph
        outcome: CausalityProof | Refusal
        if top_level:
            outcome = prove(loop, operand_values(module, loop, node, parameters=False), thorough=False)
            if isinstance(outcome, Refusal) and outcome.step is not None:
                outcome = prove(loop, operand_values(module, loop, node, parameters=True))
        else:
            outcome = prove(loop)
        if isinstance(outcome, Refusal):
            _log.debug("%s stays a loop: %s", node, outcome)
            return _with_reason(rolled, outcome)
        structure = outcome.structure
        hazard = indexes_by_guess(structure.loop.body, [structure.array])
        if structure.array_spec.device.type != "cpu" and hazard is not None:
            return rolled.with_reason(
                f"not collapsed: {hazard}, which would stop the device where the guess is out of range"
            )
        restrided = layout_matters(outcome)
        other = others_matter(outcome, node.args, restrided=restrided) if self.exact else None
        if other is not None:
            return rolled.with_reason(
                f"not collapsed: {other} is laid out otherwise at other steps, and bits depend on it"
            )
        watched = {name: attrgetter(name)(module) for name in outcome.reads}
        return JacobiWrites(
            outcome,
            window=self._window(outcome),
            restrided=restrided,
            batch=self._batched,
            watched=watched,
            measure=self.measure,
            memory_limit=self.memory_limit,
        )

    def _batched(self, tail: Loop) -> nn.Module:
        return batch_tail(tail, exact=self.exact)

    def _window(self, proof: CausalityProof) -> int | None:
        """The window asked for, or of the default size."""
        steps = proof.structure.trip_count
        window = max(1, min(_WINDOW, steps // 4)) if self.window is None and self.windowed else self.window
        return None if window is None or window >= steps else window


def _with_reason(loop: Loop, refusal: Refusal) -> Loop:
    """Return a loop that says why it was not collapsed."""
    return loop.with_reason(f"not collapsed: {refusal}")


def operand_values(module: fx.GraphModule, loop: Loop, node: fx.Node, *, parameters: bool) -> list[Value]:
    """Return what the graph around a loop knows of its operands: buffers and constants, and what follows from them.

    Args:
        module: The graph that calls the loop.
        loop: The loop.
        node: Its call.
        parameters: Whether the values of parameters count as known.
    """
    wanted = {argument for argument in node.args if isinstance(argument, fx.Node)}
    for binding in loop.bindings:
        if isinstance(binding, Table):
            wanted -= {node.args[operand] for operand in binding.operands}
    values: dict[fx.Node, Value] = {}
    names: dict[str, Value] = {}
    pending = list(wanted)
    chosen: set[fx.Node] = set()
    while pending:
        one = pending.pop()
        if one in chosen or one in values:
            continue
        if one.op in ("placeholder", "call_module"):
            # What other loops compute is data; a constant does not come out of a loop.
            values[one] = fill(spec_of(one), -1)
            continue
        chosen.add(one)
        if one.op == "get_attr":
            tensor = attrgetter(str(one.target))(module)
            if isinstance(tensor, torch.Tensor) and (parameters or not isinstance(tensor, nn.Parameter)):
                names[str(one.target)] = constant(tensor, str(one.target))
            else:
                names[str(one.target)] = fill(spec_of(one), -1)
        pending.extend(one.all_input_nodes)
    part = _slice(module, chosen | set(values))
    env = interpret(Context(-1), part[0], {part[1][n]: value for n, value in values.items()}, names)
    found: list[Value] = []
    for argument in node.args:
        copy = part[1].get(argument) if isinstance(argument, fx.Node) else None
        known = copy is not None and copy in env
        found.append(env[copy] if known and copy is not None else _blank(argument))
    # The array itself is what the analysis is about: its initial values are data.
    return found


def _blank(argument: object) -> Value:
    return fill(spec_of(argument), -1) if isinstance(argument, fx.Node) else argument


def _slice(module: fx.GraphModule, chosen: set[fx.Node]) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """Copy a part of a graph; nodes outside of it that are read become placeholders."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node not in chosen:
            continue
        if node.op in ("placeholder", "call_module"):
            copies[node] = graph.placeholder(node.name)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
    graph.output(())
    return assemble(graph, module), copies  # no code is generated: nobody runs it
