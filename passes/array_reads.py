"""Reads of arrays that the program writes: what was written there, or a view of the array."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import fx

from fxjacobi.assemble import append_node
from fxjacobi.graph import Site, Spec, TensorSpec, site_of, spec_of, stamp
from fxjacobi.layouts import dense, in_one_order, lie_alike, selected
from fxjacobi.ops import restride, write
from fxjacobi.passes.escaping import escaping
from fxjacobi.passes.memory_effects import WRITES, Alignment, Need, Needs
from fxjacobi.passes.write_history import FEW, Region, WriteHistory, normalised
from fxjacobi.placement import rounding_unit

__all__ = ["ArrayReads", "Entry", "filled", "slice_arguments", "tensor"]

_aten = torch.ops.aten

Entry: TypeAlias = int | tuple[int, int, int]
"""A position of a dimension, or ``(start, stop, step)``."""


class ArrayReads:
    """Emits selects and slices into ``graph``, forwarding what was written to arrays there.

    Must not fire where the caller would see two results share memory, nor, if ``exact``, where rounding may depend on
    how the value lies in memory (:mod:`fxjacobi.passes.memory_effects`).

    Args:
        graph: The graph that is emitted.
        old: The graph that it rewrites.
        exact: Whether bits must not change.
    """

    def __init__(self, graph: fx.Graph, old: fx.Graph, *, exact: bool) -> None:
        self.graph = graph
        self.exact = exact
        self.needs = Needs()
        self.aligned = Alignment()
        self.escaping = escaping(old)
        self.history = WriteHistory()
        self._chain: dict[fx.Node, list[fx.Node]] = {}
        for node in old.nodes:
            if node.target in WRITES:
                self._chain[node] = self._chain.get(node.args[0], [])
                self._chain[node].append(node)

    def emit(self, target: Any, args: tuple[Any, ...], spec: Spec, site: Site | None) -> fx.Node:
        """Append one operation that writes nothing."""
        return stamp(append_node(self.graph, "call_function", target, args, {}), spec, site)

    def note(self, node: fx.Node, old: fx.Node) -> fx.Node:
        """Tell the history of ``node``, which stands for ``old``, if it writes."""
        if node.target is write:
            base, value, index = node.args
            assert isinstance(base, fx.Node)
            assert isinstance(value, fx.Node)
            spec = tensor(base)
            region = normalised(index, spec.shape)  # type: ignore[arg-type]
            fits = tensor(value).dtype == spec.dtype and region is not None
            if region is not None and fits and tensor(value).shape == _shape(region, spec.shape):
                self.history.write(node, base, value, region, short=len(self._chain[old]) <= FEW)
        return node

    def read(
        self,
        node: fx.Node,
        source: fx.Node,
        dim: int,
        entry: Entry,
        outer: TensorSpec | None = None,
    ) -> fx.Node:
        """``source`` at ``entry`` of ``dim``: what was written there, or a view of the first tensor of its views.

        ``outer`` is the spec of ``node`` where that is this view with ``dim`` kept.
        """
        spec = tensor(node)
        if outer is not None:
            spec = dense(spec, spec.shape[:dim] + spec.shape[dim + 1 :], spec.stride[:dim] + spec.stride[dim + 1 :])
        part = self.history.part(source, len(tensor(source).shape), dim, entry)
        if part is None or node in self.escaping:
            return self.view(source, dim, entry, node)
        root, region = part
        found, written = self.history.find(root, region)
        if written is not None and not self.may_move(node, root, region):
            found, written = root, None
        if written is None and found is root:
            made = self.view(source, dim, entry, node)
            self.history.note_part(made, root, region)
            return made
        made = self.at(found, region if written is None else _within(region, written), node)
        if written is None:
            self.history.note_part(made, found, region)
            if lie_alike(tensor(made), spec):  # an earlier state of the array lies where its later states do
                return made
        return self.laid_out(made, spec, node)

    def may_move(self, node: fx.Node, array: fx.Node, region: Region) -> bool:
        """Whether ``node``, an array at ``region``, may be read from a tensor of its own.

        Where alignment may matter it may if all positions of the array are aligned as a tensor is: some would not do,
        for then one loop would read its array in two ways.
        """
        if not self.exact or self.needs.of(node) < Need.ALIGNMENT:
            return True
        spec = tensor(array)
        unit = rounding_unit(spec.device)
        return self.aligned(array) and all(
            entry is None or stride * spec.dtype.itemsize % unit == 0
            for entry, stride in zip(region, spec.stride, strict=True)
        )

    def laid_out(self, made: fx.Node, spec: TensorSpec, node: fx.Node) -> fx.Node:
        """``made`` in ``spec``'s memory layout, if something that reads it may round by layout."""
        need = self.needs.of(node) if self.exact else Need.ELEMENTS
        if need is Need.ELEMENTS or (need is Need.ORDER and in_one_order(tensor(made), spec)):
            return made
        if lie_alike(tensor(made), spec) and (need < Need.ALIGNMENT or self.aligned(made)):
            return made
        return self.emit(restride, (made, spec.stride), spec, site_of(node))

    def at(self, source: fx.Node, region: Region, node: fx.Node) -> fx.Node:
        """``source`` at ``region``: selects first, then slices."""
        removed = 0
        for dim, entry in enumerate(region):
            if isinstance(entry, int):
                source = self.read_plain(source, dim - removed, entry, node)
                removed += 1
        kept = [entry for entry in region if not isinstance(entry, int)]
        for dim, entry in enumerate(kept):
            if entry is not None:
                source = self.read_plain(source, dim, entry, node)
        return source

    def read_plain(self, source: fx.Node, dim: int, entry: Entry, node: fx.Node) -> fx.Node:
        """One view, noted as a part of a written array if it is one."""
        part = self.history.part(source, len(tensor(source).shape), dim, entry)
        made = self.view(source, dim, entry, node)
        if part is not None:
            self.history.note_part(made, *part)
        return made

    def view(self, source: fx.Node, dim: int, entry: Entry, node: fx.Node) -> fx.Node:
        """Emit a ``select`` or ``slice``, merged with the views that ``source`` is made by."""
        spec, site = tensor(source), site_of(node)
        if source.target is _aten.unsqueeze.default and source.args[1] == dim and isinstance(entry, int):
            assert isinstance(source.args[0], fx.Node)
            return source.args[0]
        if source.target is _aten.slice.Tensor:
            inner, at, start, _, step = slice_arguments(source)
            if at == dim:
                if isinstance(entry, int):
                    return self.view(inner, dim, start + entry * step, node)
                begin, end = start + entry[0] * step, start + (entry[1] - 1) * step + 1
                if entry[1] > entry[0]:
                    return self.view(inner, dim, (begin, end, step * entry[2]), node)
            elif isinstance(entry, int):  # selects before slices
                chosen = self.view(inner, dim, entry, node)
                return self.view(chosen, at - (dim < at), slice_arguments(source)[2:], node)
        if isinstance(entry, int):
            return self.emit(_aten.select.int, (source, dim, entry), selected(spec, dim), site)
        start, stop, step = entry
        size = (stop - start + step - 1) // step
        shape = (*spec.shape[:dim], size, *spec.shape[dim + 1 :])
        stride = (*spec.stride[:dim], spec.stride[dim] * step, *spec.stride[dim + 1 :])
        args = (source, dim, start, stop) if step == 1 else (source, dim, start, stop, step)
        return self.emit(_aten.slice.Tensor, args, dense(spec, shape, stride), site)


def tensor(node: fx.Node) -> TensorSpec:
    """The spec of a node that is a tensor."""
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec), node
    return spec


def _shape(region: Region, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor of ``shape`` at ``region``."""
    return tuple(
        size if entry is None else len(range(*entry))
        for entry, size in zip(region, shape, strict=True)
        if not isinstance(entry, int)
    )


def _within(read: Region, written: Region) -> Region:
    """The part of a write's value that a read inside it sees."""
    region: list[int | tuple[int, int, int] | None] = []
    for r, w in zip(read, written, strict=True):
        if isinstance(w, int):
            continue
        if w is None or not isinstance(r, int):
            region.append(None if r == w else r)
        else:
            region.append((r - w[0]) // w[2])
    return tuple(region)


def slice_arguments(node: fx.Node) -> tuple[fx.Node, int, int, int, int]:
    """A canonical slice's tensor, dimension, start, stop and step."""
    source, dim, start, stop, step = filled(node.args, 1)
    return source, dim, start, stop, step


def filled(args: tuple[Any, ...], leading: int) -> tuple[Any, ...]:
    """The arguments of a slice with its defaults, ``leading`` of them before the dimension."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    return args + defaults[len(args) - leading :]
