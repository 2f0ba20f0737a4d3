"""Recording a submodule once: later calls with the same signature run without the recorder and become one node.

A 1,024-step loop over a network of 1,000 operations would otherwise be a million nodes. A call may stand for its
first recording only if that recording was *clean*: no branch on data, no random draw, nothing written but its own
memory, nothing read but its tensor arguments and attributes, and every Python value reachable from the submodule
still what it was (:class:`fxjacobi.watch.Watch`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _python_dispatch

from fxjacobi.aliasing import Region, storage_key
from fxjacobi.assemble import append_node
from fxjacobi.graph import Spec, is_random, make_module, spec_of_value
from fxjacobi.ops import GUARDS
from fxjacobi.trees import Skeleton, split
from fxjacobi.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxjacobi.recorder import Recorder

__all__ = ["Outliner"]

_MINIMUM = 8  # recorded operations under which a call node costs more than it saves


@dataclass(slots=True)
class _Entry:
    """One submodule with one signature."""

    name: str
    start: int
    end: int
    inputs: list[fx.Node]
    attributes: list[fx.Node]
    outputs: list[fx.Node]
    skeleton: Skeleton
    specs: tuple[Spec, ...]
    watch: Watch
    regions: list[Region]
    reused: int = 0
    nodes: list[fx.Node] = field(default_factory=list)


class Outliner:
    """Stands in for ``nn.Module.__call__`` during a recording."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._entries: dict[Any, _Entry | None] = {}
        self._named: list[_Entry] = []

    def call(
        self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run ``module(*args, **kwargs)``, recording its operations or a single call of the earlier recording."""
        recorder = self._recorder
        if recorder.paused or recorder.failure is not None:
            return original(module, *args, **kwargs)
        begun = time.perf_counter()
        skeleton, tensors = split((args, kwargs))
        inputs = self._input_nodes(tensors)
        if inputs is None:
            return original(module, *args, **kwargs)
        pattern = tuple(inputs.index(node) for node in inputs)
        grads = tuple(t.requires_grad for t in tensors) if recorder.gradients else ()
        specs = tuple(spec_of_value(t) for t in tensors)
        key = (id(module), skeleton, specs, pattern, grads, torch.is_grad_enabled())
        if key not in self._entries:
            return self._first(key, original, module, args, kwargs, inputs)
        entry = self._entries[key]
        usable = entry is not None and self._valid(entry)
        recorder.overhead_s += time.perf_counter() - begun
        if entry is None or not usable:
            return original(module, *args, **kwargs)
        return self._again(entry, original, module, args, kwargs, inputs)

    def _input_nodes(self, tensors: list[torch.Tensor]) -> list[fx.Node] | None:
        recorder = self._recorder
        nodes = []
        for tensor in tensors:
            region = recorder.memory.regions.get(storage_key(tensor)) if type(tensor) is torch.Tensor else None
            # A view not registered yet, or memory first met here, is left to the ordinary recording.
            if region is None or (region.tensor is tensor and self._is_attribute(region)):
                return None
            try:
                nodes.append(recorder.memory.lookup(tensor))
            except Exception:  # noqa: BLE001 - the ordinary recording meets it again and reports it with its site
                return None
        return nodes

    @staticmethod
    def _is_attribute(region: Region) -> bool:
        return region.origin is not None and region.origin.op == "get_attr"

    def _valid(self, entry: _Entry) -> bool:
        untouched = not any(region.version for region in entry.regions)
        modes = _python_dispatch._get_current_dispatch_mode_stack()
        return untouched and bool(modes) and modes[-1] is self._recorder and entry.watch.holds()

    def _first(self, key: Any, original: Any, module: nn.Module, args: Any, kwargs: Any, inputs: list[fx.Node]) -> Any:
        recorder = self._recorder
        self._entries[key] = None  # a recursive call is recorded in line
        start, writes = len(recorder.memory.nodes), len(recorder.memory.written)
        result = original(module, *args, **kwargs)
        if recorder.failure is not None or len(recorder.memory.nodes) - start < _MINIMUM:
            return result
        begun = time.perf_counter()
        try:
            self._entries[key] = self._clean(module, result, inputs, start, writes)
        finally:
            recorder.overhead_s += time.perf_counter() - begun
        return result

    def _clean(self, module: nn.Module, result: Any, inputs: list[fx.Node], start: int, writes: int) -> _Entry | None:
        """The entry of a recording from node ``start`` on, if it was clean."""
        recorder = self._recorder
        opaque: list[Any] = []
        skeleton, tensors = split(result, opaque=opaque.append)
        if opaque or any(birth < start for birth in recorder.memory.written[writes:]):
            return None
        nodes = recorder.memory.nodes[start:]
        inside = set(nodes)
        outputs, storages = [], set()
        for tensor in tensors:
            region = recorder.memory.regions.get(storage_key(tensor))
            if region is None or region.birth < start or storage_key(tensor) in storages:
                return None
            if region.views[region.base].node.meta.get("literal"):
                return None  # the graph's memory, of which each call gives a copy
            storages.add(storage_key(tensor))
            outputs.append(recorder.memory.lookup(tensor))
        attributes: dict[fx.Node, None] = {}
        given = set(inputs)
        for node in nodes:
            if node.target in GUARDS or is_random(node):
                return None
            for source in node.all_input_nodes:
                if source in inside:
                    continue
                if source.op == "get_attr" and source not in given:
                    attributes[source] = None
                elif source not in given:
                    return None
        if (
            len(nodes) < 1 + len(outputs)
            or not set(outputs) <= inside
            or len(recorder.memory.nodes) != start + len(nodes)
        ):
            return None
        watch = Watch()
        watch.add(module, "")
        name = f"recorded_{len(self._entries)}_{type(module).__name__.lower()}"
        specs = tuple(spec_of_value(t) for t in tensors)
        return _Entry(
            name, start, len(recorder.memory.nodes), inputs, list(attributes), outputs, skeleton, specs, watch,
            [region for region in recorder.memory.regions.values() if region.origin in attributes],
        )  # fmt: skip

    def _again(
        self, entry: _Entry, original: Any, module: nn.Module, args: Any, kwargs: Any, inputs: list[fx.Node]
    ) -> Any:
        recorder = self._recorder
        recorder.paused = True
        try:
            with _python_dispatch._pop_mode_temporarily():
                result = original(module, *args, **kwargs)
        except BaseException as error:
            recorder.stopped_by(error, f"{type(module).__name__} raised")
            raise
        finally:
            recorder.paused = False
        begun = time.perf_counter()
        skeleton, tensors = split(result)
        fresh = all(storage_key(t) not in recorder.memory.regions for t in tensors)
        if skeleton != entry.skeleton or tuple(spec_of_value(t) for t in tensors) != entry.specs or not fresh:
            raise recorder.refuse(
                f"{type(module).__name__} returned another structure than the first time, for equal arguments",
                "let it depend on its arguments and attributes only",
            )
        if not entry.reused:
            self._named.append(entry)
        entry.reused += 1
        call = append_node(recorder.memory.graph, "call_module", entry.name, (*inputs, *entry.attributes), {})
        self._record(call, entry)
        for position, tensor in enumerate(tensors):
            item = recorder.memory.emit(getitem, (call, position), {}, entry.specs[position])
            recorder.memory.add_fresh(tensor, item)
        recorder.overhead_s += time.perf_counter() - begun
        return result

    def _record(self, call: fx.Node, entry: _Entry) -> None:
        call.meta["spec"], call.meta["site"] = entry.specs, self._recorder.sites.find()
        self._recorder.memory.nodes.append(call)

    def finish(self, root: nn.Module) -> None:
        """Turn the first recording of every reused submodule into a graph module of ``root`` and a call of it."""
        recorder = self._recorder
        modules: dict[str, fx.GraphModule] = {}
        for entry in sorted(self._named, key=lambda e: e.end - e.start):
            nodes = list(dict.fromkeys(recorder.memory.nodes[entry.start : entry.end]))
            module = _extract(entry, nodes, modules)
            modules[entry.name] = module
            root.add_module(entry.name, module)
            inside, outputs = set(nodes), set(entry.outputs)
            if any(user not in inside for node in nodes if node not in outputs for user in node.users):
                continue  # a value leaves by another way (a view of it was made outside): the first call stays in line
            with recorder.memory.graph.inserting_before(nodes[0]):
                call = recorder.memory.graph.create_node("call_module", entry.name, (*entry.inputs, *entry.attributes))
                call.meta["spec"], call.meta["site"] = entry.specs, nodes[0].meta["site"]
                items = []
                for position, output in enumerate(entry.outputs):
                    item = recorder.memory.graph.create_node("call_function", getitem, (call, position))
                    item.meta["spec"], item.meta["site"] = entry.specs[position], output.meta["site"]
                    output.replace_all_uses_with(item)
                    items.append(item)
                    for other in self._named:  # an enclosing recording may return this value
                        other.outputs = [item if o is output else o for o in other.outputs]
                        other.inputs = [item if o is output else o for o in other.inputs]
            for node in reversed(nodes):
                recorder.memory.graph.erase_node(node)
            padding = [call] * (entry.end - entry.start - 1 - len(items))  # positions of enclosing recordings stay
            recorder.memory.nodes[entry.start : entry.end] = [call, *items, *padding]


def _extract(entry: _Entry, nodes: list[fx.Node], modules: dict[str, fx.GraphModule]) -> fx.GraphModule:
    """The recorded ``nodes`` as a function of the submodule's tensor arguments and attributes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for position, source in enumerate((*entry.inputs, *entry.attributes)):
        prefix = "attribute" if position >= len(entry.inputs) else "argument"
        copy = graph.placeholder(f"{prefix}_{position}")
        copy.meta["spec"], copy.meta["site"] = source.meta["spec"], source.meta.get("site")
        copies.setdefault(source, copy)
    holder = nn.Module()
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if node.op == "call_module":
            holder.add_module(str(node.target), modules[str(node.target)])
    graph.output(tuple(copies[o] for o in entry.outputs))
    return make_module(holder, graph)
