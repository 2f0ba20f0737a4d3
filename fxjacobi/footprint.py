"""How much memory a solve holds, from the specs of the loop's body: what a plan states, and what ranges are cut by."""

from __future__ import annotations

import operator
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from fxjacobi.graph import Spec, TensorSpec, spec_of
from fxjacobi.loops import Carried, Invariant, Literal, Loop

if TYPE_CHECKING:
    from fxjacobi.methods.method import Method

__all__ = ["StateSize", "bytes_of", "input_bytes", "row_bytes", "solve_bytes"]

_rows: weakref.WeakKeyDictionary[Loop, int] = weakref.WeakKeyDictionary()


def bytes_of(spec: Spec) -> int:
    """Return the bytes of a value's elements."""
    if isinstance(spec, TensorSpec):
        return torch.Size(spec.shape).numel() * spec.dtype.itemsize
    return sum(map(bytes_of, spec)) if spec is not None else 0


@dataclass(frozen=True, slots=True)
class StateSize:
    """The size of one step's state.

    Args:
        bytes: Of all components.
        elements: Floating-point elements of one sample.
        itemsize: Bytes of one of these.
        batch: Samples.
        reach: Largest distance of a carry.
    """

    bytes: int
    elements: int
    itemsize: int
    batch: int
    reach: int

    @staticmethod
    def of(loop: Loop, batch: int | None = None) -> StateSize:
        """Return the size of ``loop``'s state; without ``batch``, dimension 0 of every component counts as the samples."""
        total = elements = itemsize = 0
        sizes: set[int] = set()
        reach, seen = 1, set[int]()
        placeholders = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
        for placeholder, binding in zip(placeholders, loop.bindings, strict=True):
            spec = spec_of(placeholder)
            if not isinstance(binding, Carried) or not isinstance(spec, TensorSpec):
                continue
            reach = max(reach, min(binding.distance, loop.trip_count))
            if binding.output in seen:
                continue
            seen.add(binding.output)
            total += bytes_of(spec)
            if spec.dtype.is_floating_point:
                elements += torch.Size(spec.shape).numel()
                itemsize = max(itemsize, spec.dtype.itemsize)
                sizes.add(spec.shape[0] if len(spec.shape) > 1 else 1)
        samples = batch if batch is not None else (sizes.pop() if len(sizes) == 1 else 1)
        return StateSize(total, elements // max(1, samples), itemsize, max(1, samples), reach)

    @property
    def jacobian_bytes(self) -> int:
        """Bytes of ``J_t`` for one step, its companion form, and the pairs, halves and results of a scan of such."""
        order = self.elements * self.reach
        return self.batch * self.itemsize * (self.reach * self.elements**2 + 4 * order**2)


def row_bytes(loop: Loop) -> int:
    """Return the bytes that one step of a batched evaluation holds: its inputs, and the most that lives at once."""
    found = _rows.get(loop)
    if found is None:
        found = _rows[loop] = input_bytes(loop) + _live_bytes(loop.body)
    return found


def input_bytes(loop: Loop) -> int:
    """Return the bytes of what one step reads that varies from step to step, the state before it included."""
    placeholders = [node for node in loop.body.graph.nodes if node.op == "placeholder"]
    varying = [p for p, b in zip(placeholders, loop.bindings, strict=True) if not isinstance(b, (Invariant, Literal))]
    return sum(bytes_of(placeholder.meta.get("spec")) for placeholder in varying)


def _live_bytes(body: fx.GraphModule) -> int:
    """Return the largest sum of the values that live at once while ``body`` runs; views live in what they look at."""
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    nodes = list(body.graph.nodes)
    for place, node in enumerate(nodes):
        shared = _is_view(node) and isinstance(node.args[0], fx.Node)
        owner[node] = owner[node.args[0]] if shared else node
        for source in node.all_input_nodes:
            last[owner[source]] = place
    now = most = 0
    ends: dict[int, int] = {}
    for place, node in enumerate(nodes):
        if node.op in ("call_function", "call_module"):
            inner = 0
            if node.op == "call_module":
                module = body.get_submodule(str(node.target))
                module = module.body if isinstance(module, Loop) else module
                inner = _live_bytes(module) if isinstance(module, fx.GraphModule) else 0
            if owner[node] is node:
                size = bytes_of(node.meta.get("spec"))
                now += size
                end = last.get(node, place)
                ends[end] = ends.get(end, 0) + size
            most = max(most, now + inner)
        now -= ends.get(place, 0)
    return most


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem or node.target is torch.ops.aten._unsafe_view.default:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(r.alias_info is not None for r in node.target._schema.returns)


def solve_bytes(loop: Loop, method: Method, memory_limit: int | None = None) -> int:
    """Return an estimate of the bytes that a solve holds at its peak, beyond its operands.

    Two trajectories and their difference, the stacked outputs, one batched evaluation of as many steps as the method takes
    at once (and ``memory_limit`` admits), and what the method itself holds.
    """
    steps = loop.trip_count
    size = StateSize.of(loop)
    outputs = {r.output for r in loop.results} - {b.output for b in loop.bindings if isinstance(b, Carried)}
    output = next(node for node in reversed(loop.body.graph.nodes) if node.op == "output")
    others = sum(bytes_of(output.args[0][o].meta.get("spec")) for o in outputs)
    row, own = max(1, row_bytes(loop)), max(1, method.bytes_per_step(loop, size))
    rows = method.rows_at_once(steps, size.reach)
    rows = rows if memory_limit is None else max(1, min(rows, memory_limit // row))
    window = steps if memory_limit is None else max(1, min(steps, memory_limit // own))
    return steps * (3 * size.bytes + others) + rows * row + (window * own if own > 1 else 0)
