"""Recording :func:`fxjacobi.scan` as a loop that is already rolled: one step is recorded, all steps run.

The first step is recorded and becomes the body of a :class:`fxjacobi.loops.Loop`; the others run without the recorder,
so a scan of 100,000 steps costs its ordinary run and one node. As for a submodule that is recorded once
(:mod:`fxjacobi.outline`), a step that branches on data, draws, or writes to memory from before it is left to the
ordinary recording, step by step.
"""

from __future__ import annotations

from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _python_dispatch

from fxjacobi.graph import Spec, TensorSpec, is_random, make_module, spec_of_value
from fxjacobi.loops import Binding, Carried, Invariant, Loop, Result, Scanned, Stacked, Step
from fxjacobi.ops import GUARDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxjacobi.recorder import Recorder

__all__ = ["ScanRecording"]

aten = torch.ops.aten

_ALIGNMENT = 64  # bytes: torch's CPU allocator starts every tensor at a multiple


class ScanRecording:
    """One scan inside a recording.

    Args:
        recorder: The recorder of the run.
        carries: The carry's tensors before the first step.
        xs: The scanned tensors ``(T, ...)``.
        reverse: Whether the steps go from ``T - 1`` down.
    """

    def __init__(
        self, recorder: Recorder, carries: Sequence[torch.Tensor], xs: Sequence[torch.Tensor], *, reverse: bool
    ) -> None:
        self._recorder = recorder
        self._carries = [recorder.memory.lookup(c) for c in carries]
        self._xs = [recorder.memory.lookup(x) for x in xs]
        self._reverse = reverse
        self._slices: list[fx.Node] = []
        self._start = self._written = 0

    @staticmethod
    def apart(recorder: Recorder, values: Sequence[Any]) -> list[Any] | None:
        """Return the first step's arguments in memory of their own, laid out as they are; ``None`` where that cannot be.

        The recorder knows values by their memory, and a step may read that of a carry's first value, or of the first
        slice, otherwise too: as another carry, or to start again from it. Such a read is an invariant of the loop.
        """
        copies: list[Any] = []
        for value in values:
            if value is not None and not isinstance(value, torch.Tensor):
                return None
            recorder.paused = True  # the copy is no part of the run
            try:
                copy = None if value is None else _laid_out_alike(value)
            finally:
                recorder.paused = False
            if copy is None and value is not None:
                return None
            copies.append(copy)
        for value, copy in zip(values, copies, strict=True):
            if copy is not None:
                memory = recorder.memory
                memory.add_fresh(
                    copy, memory.emit(aten.alias.default, (memory.lookup(value),), {}, spec_of_value(copy))
                )
        return copies

    def begin(self, slices: Sequence[torch.Tensor]) -> None:
        """Call before the first step with its slices of ``xs``, made while recording."""
        memory = self._recorder.memory
        self._slices = [memory.lookup(x) for x in slices]
        self._start, self._written = len(memory.nodes), len(memory.written)

    def recorded(self, carries: Sequence[Any], outputs: Sequence[Any]) -> list[fx.Node] | None:
        """After the first step: its values' nodes, or ``None`` if the step is not clean."""
        recorder, memory = self._recorder, self._recorder.memory
        if recorder.failure is not None or any(birth < self._start for birth in memory.written[self._written :]):
            return None
        if any(n.op == "call_module" or n.target in GUARDS or is_random(n) for n in memory.nodes[self._start :]):
            return None
        values = [*carries, *outputs]
        if not all(isinstance(v, torch.Tensor) for v in values):
            return None
        specs = [n.meta["spec"] for n in self._carries]
        for value, spec in zip(carries, specs, strict=True):
            found = spec_of_value(value)
            assert isinstance(found, TensorSpec)
            if (found.shape, found.dtype, found.device) != (spec.shape, spec.dtype, spec.device):
                return None  # the step's own check names it
        return [memory.lookup(v) for v in values]

    def run_unrecorded(self, rest: Callable[[], Any]) -> Any:
        """Run the other steps without the recorder."""
        self._recorder.paused = True
        try:
            with _python_dispatch._pop_mode_temporarily():
                return rest()
        except BaseException as error:
            self._recorder.stopped_by(error, "a step of fxjacobi.scan raised")
            raise
        finally:
            self._recorder.paused = False

    def finish(
        self,
        steps: int,
        values: Sequence[fx.Node],
        carries: Sequence[torch.Tensor],
        stacked: Sequence[torch.Tensor],
        root: nn.Module,
    ) -> None:
        """Replace the recorded step by the loop, and register the scan's results as its values."""
        memory = self._recorder.memory
        nodes = memory.nodes[self._start :]
        body, bindings, operands = self._body(nodes, values, steps)
        count = len(carries)
        results: list[Result] = [Step(i, steps - 1) for i in range(count)]
        results += [Stacked(count + i) for i in range(len(stacked))]
        for node in reversed(nodes):
            memory.graph.erase_node(node)
        del memory.nodes[self._start :]
        name = f"scan_{sum(isinstance(m, Loop) for m in root.children())}"
        root.add_module(name, Loop(body, steps, bindings, results))
        call = memory.graph.create_node("call_module", name, tuple(operands))
        call.meta["spec"] = tuple(spec_of_value(v) for v in (*carries, *stacked))
        call.meta["site"] = memory.site
        memory.nodes.append(call)
        for position, tensor in enumerate((*carries, *stacked)):
            node = memory.emit(getitem, (call, position), {}, spec_of_value(tensor))
            if self._reverse and position >= count:
                node = memory.emit(aten.flip.default, (node, [0]), {}, spec_of_value(tensor))
            memory.add_fresh(tensor, node)

    def _body(
        self, nodes: Sequence[fx.Node], values: Sequence[fx.Node], steps: int
    ) -> tuple[fx.GraphModule, list[Binding], list[fx.Node]]:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        bindings: list[Binding] = []
        operands: list[fx.Node] = []

        def placeholder(name: str, stands_for: fx.Node, operand: fx.Node, binding: Binding) -> None:
            node = graph.placeholder(name)
            spec: Spec = stands_for.meta["spec"]
            node.meta["spec"], node.meta["site"] = spec, stands_for.meta.get("site")
            copies[stands_for] = node
            bindings.append(binding)
            operands.append(operand)

        indices = range(steps - 1, -1, -1) if self._reverse else range(steps)
        for position, (piece, whole) in enumerate(zip(self._slices, self._xs, strict=True)):
            placeholder(f"x_{position}", piece, whole, Scanned(len(operands), 0, indices))
        for position, carry in enumerate(self._carries):
            placeholder(f"carry_{position}", carry, carry, Carried(position, 1, (len(operands),)))
        inside = set(nodes)
        for node in (*nodes, *values):
            sources = node.all_input_nodes if node in inside else [node]
            for source in sources:
                if source not in inside and source not in copies:
                    placeholder(f"invariant_{len(operands)}", source, source, Invariant(len(operands)))
        for node in nodes:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        graph.output(tuple(copies[v] for v in values))
        return make_module(nn.Module(), graph), bindings, operands


def _laid_out_alike(value: torch.Tensor) -> torch.Tensor | None:
    """Return a copy with the strides and the alignment of ``value``, on which the last bits of a product depend."""
    if value.is_conj() or value.is_neg():
        return None
    once = value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.stride())]
    extent = 1
    for stride, size in sorted(zip(once.stride(), once.shape, strict=True)):
        if size > 1:
            if stride < extent:
                return None  # elements share memory
            extent = stride * (size - 1) + extent
    phase, itemsize = value.data_ptr() % _ALIGNMENT, value.element_size()
    memory = torch.empty(extent + _ALIGNMENT // itemsize, dtype=value.dtype, device=value.device)
    offset = (phase - memory.data_ptr()) % _ALIGNMENT
    if offset % itemsize:
        return None
    copy = memory.as_strided(once.shape, once.stride(), offset // itemsize)
    return copy.copy_(once).expand(value.shape)
