"""The recording tracer: a dispatch mode that watches a real run and writes it down as a functional graph.

Every operation executes as it would without the recorder, on the user's own tensors; the recorder only looks at what
goes in and comes out. So the recorded call *is* the ordinary run, whatever happens to the recording: the first thing
that cannot be recorded is kept as :attr:`Recorder.failure`, recording stops, and the run goes on.
"""

from __future__ import annotations

import time
from operator import getitem as _getitem
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from fxjacobi import ops
from fxjacobi.aliasing import Geometry, View, geometry_of, storage_key
from fxjacobi.errors import CaptureError
from fxjacobi.functional import functional_counterpart, mutation_of
from fxjacobi.generators import generator_key
from fxjacobi.graph import spec_of_value
from fxjacobi.memory import Memory, tensor_spec
from fxjacobi.placement import placed_copy
from fxjacobi.recorded_operations import CHECKS, FILLED, LIFTS, REFUSED, SPLITS
from fxjacobi.sites import SiteFinder
from fxjacobi.write_recorder import BATCH_NORMS, WriteRecorder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import CodeType

    from torch import fx

    from fxjacobi.graph import Site

__all__ = ["GuardedRecorder", "Recorder", "current_recorder"]

aten = torch.ops.aten


def current_recorder() -> Recorder | None:
    """The recorder of the run that this code is part of, if it is the innermost dispatch mode and still recording."""
    modes = _get_current_dispatch_mode_stack()
    mode = modes[-1] if modes else None
    return mode if isinstance(mode, Recorder) and mode.failure is None and not mode.paused else None


class Recorder(TorchDispatchMode):
    """Records into ``graph``; see the module's docstring.

    Args:
        graph: An empty graph.
        attach: Called with a tensor or object that the graph must hold, returns its attribute name.
        known: Storage key -> (qualified name, tensor) of tensors that were there before the run.
        gradients: Whether the run builds an autograd graph.
        root: The module that holds what the graph calls.
        outermost: See :class:`~fxjacobi.sites.SiteFinder`.
    """

    def __init__(
        self,
        graph: fx.Graph,
        attach: Callable[[Any, str], str],
        known: dict[int, tuple[str, torch.Tensor]],
        gradients: bool,
        root: torch.nn.Module,
        outermost: CodeType | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's mode carries no annotations
        self.gradients = gradients
        self.root = root
        self.failure: CaptureError | None = None
        self.paused = False
        self.overhead_s = 0.0
        self.memory = Memory(graph, attach, known, gradients, self.refuse)
        self.writes = WriteRecorder(self.memory, self.refuse)
        self.sites = SiteFinder(outermost)
        self.generators: dict[int, tuple[torch.Generator, torch.Tensor, Site | None]] = {}  # met, and their states then
        self.undifferentiable: str | None = None  # why an emitted module would not have the run's gradients
        self._turned: Geometry | None = None  # what a tensor that is turned in place looked like before
        self._grad_mode = torch.is_grad_enabled()

    # -- dispatch -------------------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Torch's question whether to guard the method below against dynamo: that imports dynamo, which takes seconds."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused or self.failure is not None:
            return func(*args, **kwargs)
        start = time.perf_counter()
        self.memory.site = self.sites.find()
        prepared: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        try:
            prepared = self._before(func, types, args, kwargs)
        except CaptureError as error:
            self.failure = error
        middle = time.perf_counter()
        try:
            result = func(*args, **kwargs)
        except BaseException as error:
            self.stopped_by(error, f"{func} raised")
            raise
        after = time.perf_counter()
        if prepared is not None:
            try:
                self._after(func, args, kwargs, prepared, result)
            except CaptureError as error:
                self.failure = error
        self.overhead_s += (middle - start) + (time.perf_counter() - after)
        return result

    def raise_failure(self) -> None:
        """Raise what stopped the recording, if something did."""
        if self.failure is not None:
            raise self.failure

    def stopped_by(self, error: BaseException, what: str) -> None:
        """Called when the run meets an exception half-way: where it catches it, the way it takes depends on data.

        The exception is the user's and passes on; a run that it ends is not recorded in any case.
        """
        if self.failure is None:
            self.failure = self.refuse(
                f"{what} {type(error).__name__}, which the run went on from",
                "ask beforehand, by torch operations (torch.linalg.cholesky_ex), instead of catching an exception",
            )

    def refuse(self, message: str, remedy: str | None = None) -> CaptureError:
        """Return the error for something met at the present site."""
        return CaptureError(message, site=str(self.memory.site) if self.memory.site else None, remedy=remedy)

    def _before(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for kind in types:
            if kind is not torch.Tensor and kind is not torch.nn.Parameter and kind is not torch.nn.Buffer:
                raise self.refuse(
                    f"{func} on {kind.__name__}, a tensor subclass with behaviour of its own",
                    "convert it to a plain torch.Tensor before the call",
                )
        name = func._schema.name.partition("::")[2]
        if name in REFUSED:
            raise self.refuse(f"{REFUSED[name]} ({func})", "use an out-of-place operation")
        if self.gradients and torch.is_grad_enabled() != self._grad_mode and self.undifferentiable is None:
            self.undifferentiable = f"gradients are switched inside the run at {self.memory.site}"
        if func in LIFTS:
            return args, kwargs  # a tensor that Python values were just made into: nothing to look up
        mutation = mutation_of(func)
        if torch.Tag.inplace_view in func.tags:
            self.memory.lookup(args[0])
            self._turned = self.memory.key(self.memory.regions[storage_key(args[0])], args[0])
        elif mutation is not None:
            self._save_before_write([args[p] for p in mutation.positions if p < len(args)])
            self._save_before_write([kwargs[k] for k in mutation.keywords if k in kwargs])
        elif func in BATCH_NORMS:
            self._save_before_write([a for a in args[3:5] if a is not None])
        # Arguments are looked up before the operation runs: afterwards an in-place one has changed them.
        return self._lookup_all(args), {key: self._lookup_any(value) for key, value in kwargs.items()}

    def _save_before_write(self, targets: list[Any]) -> None:
        """Keep what memory from before the run held, so that the emitted module can be checked against this run."""
        for target in targets:
            if isinstance(target, torch.Tensor):
                self.memory.lookup(target)
                region = self.memory.regions[storage_key(target)]
                if region.tensor is not None and region.version == 0 and region.saved is None:
                    region.saved = placed_copy(region.tensor.detach())

    def _lookup_all(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple([self._lookup_any(a) for a in args])

    def _lookup_any(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.memory.lookup(value)
        if isinstance(value, (list, tuple)):
            return type(value)([self._lookup_any(item) for item in value]) if value else value
        if isinstance(value, torch.Generator):
            # Seeding is refused, so until its first draw a generator is as it was before the run.
            key = generator_key(value)
            if key not in self.generators:
                self.generators[key] = (value, value.get_state(), self.memory.site)
            return self.memory.object(self.generators[key][0], "generator")
        return value

    # -- recording ------------------------------------------------------------------------------------------------

    def _after(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        prepared: tuple[tuple[Any, ...], dict[str, Any]],
        result: Any,
    ) -> None:
        nodes, keywords = prepared
        mutation = mutation_of(func)
        if torch.Tag.inplace_view in func.tags:
            self._record_turned(func, args[0], nodes)
        elif mutation is not None:
            if not self.writes.record(func, args, kwargs, nodes, keywords, mutation):
                self._record_tuple(func, nodes, keywords, result)
        elif func in BATCH_NORMS and args[5] and args[3] is not None:
            if self.gradients:
                self.undifferentiable = f"batch normalisation in training mode at {self.memory.site}"
            self.writes.record_batch_norm(func, args, nodes, result)
        elif isinstance(result, torch.Tensor):
            self._record_tensor(func, args, nodes, keywords, result)
        elif isinstance(result, (tuple, list)):
            if func in SPLITS:
                self._record_split(func, args, nodes, result)
            else:
                self._record_tuple(func, nodes, keywords, result)
        else:
            self._record_scalar(func, args, nodes, keywords, result)

    def _record_scalar(
        self, func: Any, args: tuple[Any, ...], nodes: tuple[Any, ...], keywords: dict[str, Any], result: Any
    ) -> None:
        """A Python value taken from a tensor: the run may branch on it, so it becomes a guard."""
        if func in CHECKS:
            # It returned, so it found nothing wrong; where it will, the ordinary run raises what it raises.
            wanted = CHECKS[func]
            looked_at = nodes[0]
            if wanted is False:
                looked_at = self.memory.emit(aten.any.default, nodes[:1], {}, spec_of_value(aten.any.default(args[0])))
            self.memory.emit(ops.guard, (looked_at, wanted), {}, None)
            return
        if result is None:
            raise self.refuse(f"{func} returns nothing and writes nothing that its schema names")
        if func is aten._local_scalar_dense.default:
            source = nodes[0]
        else:
            source = self.memory.emit(func, nodes, keywords, None)
        self.memory.emit(ops.guard, (source, result), {}, None)

    def _record_tensor(
        self, func: Any, args: tuple[Any, ...], nodes: tuple[Any, ...], keywords: dict[str, Any], result: torch.Tensor
    ) -> None:
        key = storage_key(result)
        region = self.memory.regions.get(key)
        if region is not None and args and isinstance(args[0], torch.Tensor) and storage_key(args[0]) == key:
            parent = self.memory.key(region, args[0])
            geometry = geometry_of(result)
            if self.gradients and (func is aten.detach.default or len(parent) > len(geometry)):
                geometry = (*geometry, True)
            view = region.views.get(geometry)
            if view is not None:
                if view.version != region.version:
                    self.memory.regenerate(region, geometry)
                return
            if keywords:
                raise self.refuse(f"{func} returned a view, with keyword arguments")
            node = self.memory.emit(func, nodes, {}, spec_of_value(result))
            region.views[geometry] = View(node, region.version, parent, func, nodes[1:])
            return
        if region is not None:
            raise self.refuse(f"{func} returned memory of a tensor that is not its first argument")
        if func in LIFTS:
            self.memory.add_fresh(result, self.memory.literal(result))
            return
        filled = FILLED.get(func)
        if func is aten._to_copy.default and not isinstance(args[0], torch.Tensor):
            filled = 0, None  # torch.vmap makes a tensor of each number
        if filled is not None and result.layout is torch.strided and result.is_contiguous():
            position, value = filled
            if position is not None:
                value = nodes[position]
            node = self.memory.emit(
                aten.full.default, (list(result.shape), value), {"dtype": result.dtype, "device": result.device},
                spec_of_value(result),
            )  # fmt: skip
        else:
            node = self.memory.emit(func, nodes, keywords, spec_of_value(result))
            self._guard_shape(func, args, node, result)
        self.memory.add_fresh(result, node)

    def _guard_shape(self, func: Any, args: tuple[Any, ...], node: fx.Node, result: torch.Tensor) -> None:
        dynamic = torch.Tag.dynamic_output_shape in func.tags
        if func is aten.index.Tensor:
            dynamic = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if dynamic:
            self.memory.emit(ops.guard_shape, (node, tuple(result.shape)), {}, None)

    def _record_tuple(self, func: Any, nodes: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
        node = self.memory.emit(func, nodes, keywords, spec_of_value(result))
        self._unpack(node, result)
        if torch.Tag.dynamic_output_shape in func.tags:
            self.memory.emit(ops.guard_shape, (node, tuple(tuple(r.shape) for r in result)), {}, None)

    def _unpack(self, node: fx.Node, result: Sequence[Any]) -> None:
        for position, item in enumerate(result):
            if isinstance(item, torch.Tensor):
                if storage_key(item) in self.memory.regions and item.numel():
                    raise self.refuse(f"{node.target} returns several views of a tensor", "use torch operations")
                self.memory.add_fresh(item, self.memory.emit(_getitem, (node, position), {}, spec_of_value(item)))
            elif isinstance(item, (tuple, list)):
                self._unpack(self.memory.emit(_getitem, (node, position), {}, spec_of_value(item)), item)

    def _record_turned(self, func: Any, tensor: torch.Tensor, nodes: tuple[Any, ...]) -> None:
        """``transpose_`` and its like write nothing: the same tensor object is another view from here on."""
        functional = functional_counterpart(func)
        if functional is None or self._turned is None:
            raise self.refuse(f"{func} changes a tensor's shape in place", "use an out-of-place view")
        region = self.memory.regions[storage_key(tensor)]
        geometry = self.memory.key(region, tensor)
        if geometry not in region.views:
            node = self.memory.emit(functional, nodes, {}, tensor_spec(tensor))
            region.views[geometry] = View(node, region.version, self._turned, functional, nodes[1:])

    def _record_split(self, func: Any, args: tuple[Any, ...], nodes: tuple[Any, ...], result: Any) -> None:
        """Several views at once: each becomes the select or slice that it is."""
        source = args[0]
        rank = source.dim()
        place = 1 if func is aten.unbind.int else 2
        dim = (args[place] if len(args) > place else 0) % rank
        start = 0
        for position, item in enumerate(result):
            if func is aten.unbind.int:
                op: Any = aten.select.int
                rest: tuple[Any, ...] = (dim, position)
            else:
                op, rest = aten.slice.Tensor, (dim, start, start + item.shape[dim])
                start += item.shape[dim]
            self._record_tensor(op, args, (nodes[0], *rest), {}, item)

    # -- what leaves the dispatcher --------------------------------------------------------------------------------

    def cannot_record(self, message: str, remedy: str) -> None:
        """Called when Python does past the dispatcher what a graph cannot hold (:mod:`fxjacobi.unseen`)."""
        if self.paused or self.failure is not None:
            return
        self.memory.site = self.sites.find()
        self.failure = self.refuse(message, remedy)

    def saw(self, tensor: torch.Tensor, value: Any) -> None:
        """Called when Python took the list ``value`` from ``tensor``."""
        if self.paused or self.failure is not None:
            return
        self.memory.site = self.sites.find()
        try:
            self.memory.emit(ops.guard_list, (self.memory.lookup(tensor), _frozen(value)), {}, None)
        except CaptureError as error:
            self.failure = error


class GuardedRecorder(Recorder):
    """A recorder for processes in which dynamo is at work: it must not compile what goes on below the dispatcher."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
