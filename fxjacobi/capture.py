"""Capture: one ordinary run of a model, written down as a functional ATen graph.

See ``docs/design.md``, section 5. :func:`record` runs the callable once, as it is, and returns both what it returned
and, unless something could not be recorded, the :class:`Capture`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx, nn

from fxjacobi.aliasing import Region, storage_key
from fxjacobi.captured import AttributeEffect, Capture, Recorded, StateInput, TensorEffect, ViewOfWritten
from fxjacobi.errors import CaptureError, StateChangedError
from fxjacobi.generators import PythonGenerators, check_own_generators
from fxjacobi.graph import TensorSpec, is_random, make_module, spec_of_value, stamp
from fxjacobi.outline import Outliner
from fxjacobi.recorder import GuardedRecorder, Recorder
from fxjacobi.settled_heap import settled_heap
from fxjacobi.timing import started
from fxjacobi.trees import Constant, Node, Skeleton, split
from fxjacobi.unseen import watched
from fxjacobi.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["AttributeEffect", "Capture", "Recorded", "StateInput", "TensorEffect", "ViewOfWritten", "capture", "record"]


def capture(fn: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Capture:
    """Run ``fn`` once and return its capture.

    Raises:
        CaptureError: Something in the run cannot be recorded; it names the user's file and line and the remedy.
    """
    recorded = record(fn, args, kwargs or {})
    if recorded.capture is None:
        assert recorded.failure is not None
        raise recorded.failure
    return recorded.capture


def record(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded:
    """Run ``fn(*args, **kwargs)`` once, ordinarily, and record it; the user's own exceptions pass through."""
    watch = Watch()
    watch.add(fn, "")
    objects: list[Any] = []
    skeleton, tensors = split((args, kwargs), opaque=objects.append)
    for item in objects:
        watch.add(item, "argument")
    root, graph = nn.Module(), fx.Graph()
    arrays = _arrays(skeleton)
    gradients = torch.is_grad_enabled() and _requires_grad(tensors, watch)
    kind = GuardedRecorder if "torch._dynamo" in sys.modules else Recorder
    recorder = kind(graph, _Attacher(root), watch.tensors, gradients, root, record.__code__)
    recorder.sites.found = watch.add_code  # now, not after the run: it may change what its code reads
    if watch.overflowed:
        recorder.failure = CaptureError(
            "the model reaches too many Python values to watch", remedy="keep large tables in tensors"
        )
    placeholders = []
    for position, tensor in enumerate(tensors):
        with graph.inserting_before(recorder.memory.front):
            placeholders.append(graph.placeholder(f"input_{position}"))
        if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
            recorder.failure = CaptureError(f"argument {position} has layout {tensor.layout}", remedy="pass it dense")
            stamp(placeholders[-1], spec_of_value(tensor))
        else:
            recorder.memory.add_input(tensor, placeholders[-1])
    if any(hasattr(item, "__next__") for item in objects):
        recorder.failure = CaptureError("an argument is an iterator, which a call uses up", remedy="pass a list")
    if arrays:
        recorder.failure = CaptureError("an argument is a NumPy array", remedy="pass it as a tensor")
    outliner = Outliner(recorder)
    python_generators = PythonGenerators(watch)
    saved_inputs = tuple(spec_of_value(t) for t in tensors)
    clock = started()
    with settled_heap(), watched(recorder, outliner), recorder:
        result = fn(*args, **kwargs)
    elapsed = clock()
    try:
        recorder.raise_failure()
        python_generators.check_untouched()
        _check_arguments(skeleton, tensors, args, kwargs)
        finished = _Finish(recorder, watch, tensors, placeholders, outliner, root)
        captured = finished.capture(skeleton, saved_inputs, result, elapsed)
        python_generators.check_known()
        return Recorded(result, captured, None, watch)
    except CaptureError as error:
        return Recorded(result, None, error, watch)


class _Attacher:
    """Names what a graph holds on its root module, live: parameters and buffers stay the user's own objects."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root

    def __call__(self, value: Any, name: str) -> str:
        base = "".join(c if c.isalnum() else "_" for c in name).strip("_") or "tensor"
        base = f"p_{base}" if base[0].isdigit() else base
        unique, count = base, 0
        while hasattr(self._root, unique):
            count += 1
            unique = f"{base}_{count}"
        if isinstance(value, nn.Parameter):
            self._root.register_parameter(unique, value)
        elif isinstance(value, torch.Tensor):
            self._root.register_buffer(unique, value, persistent=False)
        else:
            setattr(self._root, unique, value)
        return unique


def _check_arguments(
    skeleton: Skeleton, tensors: list[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    after, found = split((args, kwargs))
    if after != skeleton or len(found) != len(tensors) or any(a is not b for a, b in zip(found, tensors, strict=True)):
        raise StateChangedError(
            "the run changed a list, a dictionary or an object that it was passed", remedy="return what it makes"
        )


def _arrays(skeleton: Skeleton) -> bool:
    if isinstance(skeleton, Node):
        return any(_arrays(child) for child in skeleton.children)
    return isinstance(skeleton, Constant) and isinstance(skeleton.value, np.ndarray)


def _requires_grad(tensors: list[torch.Tensor], watch: Watch) -> bool:
    return any(t.requires_grad for t in tensors) or any(t.requires_grad for _, t in watch.tensors.values())


class _Finish:
    """Turns a finished recording into a :class:`Capture`."""

    def __init__(
        self,
        recorder: Recorder,
        watch: Watch,
        tensors: list[torch.Tensor],
        placeholders: list[fx.Node],
        outliner: Outliner,
        root: nn.Module,
    ) -> None:
        self.recorder, self.watch, self.tensors = recorder, watch, tensors
        self.placeholders, self.outliner, self.root = placeholders, outliner, root
        self.values: list[fx.Node] = []
        self.results: list[torch.Tensor] = []

    def capture(self, skeleton: Skeleton, specs: Any, result: Any, elapsed: float) -> Capture:
        recorder, graph = self.recorder, self.recorder.memory.graph
        self._check_inputs(specs)
        iterator = self.watch.used_up()
        if iterator is not None:
            raise CaptureError(f"{iterator} is an iterator, which a call uses up", remedy="pass its next value")
        opaque: list[Any] = []
        outputs, tensors = split(result, opaque=opaque.append)
        for item in opaque:
            if not self.watch.knows(item):  # the graph would return the recorded run's object again
                raise CaptureError(
                    f"the result holds a {type(item).__name__} that the run made",
                    remedy="return tensors, in containers",
                )
        left = [change.after for change in self.watch.changes() if isinstance(change.after, torch.Tensor)]
        for tensor in (*tensors, *left):
            self.recorder.memory.part_from_literal(tensor)
        self._share_memory(tensors)
        sources = tuple(self._source(tensor) for tensor in tensors)
        effects: list[TensorEffect | AttributeEffect] = [
            self._tensor_effect(region)
            for region in list(recorder.memory.regions.values())
            if region.tensor is not None and region.version
        ]
        states, attribute_effects = self._state()
        # A sampler under its own no_grad() is called with gradients on; what counts is what comes out.
        gradients = recorder.gradients and any(t.requires_grad for t in self.results)
        graph.output(tuple(self.values))
        operations = len(recorder.memory.nodes)
        self.outliner.finish(self.root)
        graph.erase_node(recorder.memory.front)
        module = make_module(self.root, graph)
        self.watch.narrow([*module.parameters(), *module.buffers()], gradients=torch.is_grad_enabled())
        return Capture(
            graph_module=module,
            inputs=skeleton,
            n_inputs=len(self.tensors),
            states=states,
            outputs=outputs,
            sources=sources,
            effects=(*effects, *attribute_effects),
            watch=self.watch,
            results=tuple(self.results),
            ordinary_s=max(elapsed - recorder.overhead_s, 1e-9),
            elapsed_s=elapsed,
            operations=operations,
            gradients=gradients,
            draws=any(is_random(node) for node in graph.nodes),
            generators=check_own_generators(recorder.generators, self.watch),
            undifferentiable=recorder.undifferentiable if gradients else None,
        )

    def _check_inputs(self, specs: Any) -> None:
        if tuple(spec_of_value(t) for t in self.tensors) != specs:
            raise CaptureError("an argument's shape or dtype was changed in place", remedy="make a new tensor")
        replaced = self.watch.replaced_storages()
        if replaced:
            raise CaptureError(
                f"the run replaced the memory or the gradient of {', '.join(replaced[:3])}",
                remedy="write to it in place, and call backward() outside the compiled function",
            )

    def _share_memory(self, tensors: list[torch.Tensor]) -> None:
        """Let results that share new memory be views of one base, as the caller may write to one of them."""
        count: dict[int, int] = {}
        for tensor in tensors:
            count[storage_key(tensor)] = count.get(storage_key(tensor), 0) + 1
        for tensor in tensors:
            region = self.recorder.memory.regions.get(storage_key(tensor))
            if region is not None and region.version and region.tensor is None and count[storage_key(tensor)] > 1:
                for view in region.views.values():
                    if view.parent is not None:
                        view.version = -1

    def _source(self, tensor: torch.Tensor) -> int | ViewOfWritten:
        recorder = self.recorder
        region = recorder.memory.regions.get(storage_key(tensor))
        if region is not None and region.tensor is not None and region.version:
            steps = []
            at = recorder.memory.key(region, tensor)
            while region.views[at].parent is not None:
                steps.append((region.views[at].op, region.views[at].args))
                at = region.views[at].parent  # type: ignore[assignment]
            target, position = self._target(region)
            return ViewOfWritten(target, position, tuple(reversed(steps)))
        return self._value(recorder.memory.lookup(tensor), tensor)

    def _value(self, node: fx.Node, tensor: torch.Tensor) -> int:
        self.values.append(node)
        self.results.append(tensor)
        return len(self.values) - 1

    def _target(self, region: Region) -> tuple[torch.Tensor | None, int | None]:
        for position, node in enumerate(self.placeholders):
            if node is region.origin:
                return None, position
        return region.tensor, None

    def _tensor_effect(self, region: Region) -> TensorEffect:
        target, position = self._target(region)
        assert region.tensor is not None
        # Into a leaf nothing but numbers can be written (weight.data *= mask): no gradient flows through it.
        result = region.tensor.detach() if region.tensor.is_leaf else region.tensor
        value = self._value(region.views[region.base].node, result)
        return TensorEffect(target, position, value, region.saved)

    def _state(self) -> tuple[tuple[StateInput, ...], tuple[AttributeEffect, ...]]:
        states: list[StateInput] = []
        effects: list[AttributeEffect] = []
        for change in self.watch.changes():
            if not isinstance(change.after, torch.Tensor) or not isinstance(change.container, (dict, list)):
                raise StateChangedError(
                    f"{change.name} changed during the run, from {change.before!r:.80} to {change.after!r:.80}",
                    remedy="keep changing state in tensors, or outside the compiled function",
                )
            region = self.recorder.memory.regions.get(storage_key(change.after))
            if region is None or region.tensor is not None:
                raise CaptureError(
                    f"{change.name} was rebound to memory that was there before the run", remedy="clone it"
                )
            effects.append(
                AttributeEffect(
                    change.container,
                    change.key,
                    self._value(self.recorder.memory.lookup(change.after), change.after),
                    change.before,
                )
            )
            if isinstance(change.before, torch.Tensor):
                states += self._state_input(change)
                spec = spec_of_value(change.before)
                assert isinstance(spec, TensorSpec)
                self.watch.relax(change.container, change.key, spec, None)
        return tuple(states), tuple(effects)

    def _state_input(self, change: Any) -> list[StateInput]:
        node = self.recorder.memory.externals.get(storage_key(change.before))
        if node is None:
            return []
        if self.watch.count(change.before) > 1:
            raise CaptureError(
                f"{change.name} was rebound, and what it held is known by another name too", remedy="clone it"
            )
        if node.meta["spec"] != spec_of_value(change.before):
            raise CaptureError(f"{change.name} was rebound, and what it held is a view", remedy="clone it")
        graph = self.recorder.memory.graph
        first = next(iter(graph.nodes))
        last = [n for n in graph.nodes if n.op == "placeholder"]
        position = graph.inserting_after(last[-1]) if last else graph.inserting_before(first)
        with position:
            placeholder = graph.placeholder(f"state_{node.name}")
        stamp(placeholder, node.meta["spec"], node.meta.get("site"))
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
        self.values = [placeholder if v is node else v for v in self.values]
        return [StateInput(change.container, change.key, change.name, change.before)]
