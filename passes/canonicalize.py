"""Give every construct one spelling, so that later passes meet few forms and equal code looks equal."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi.graph import Site, Spec, TensorSpec, site_of, spec_of, stamp
from fxjacobi.layouts import dense, is_contiguous, selected
from fxjacobi.ops import restride, write
from fxjacobi.passes.assemble import assemble, copy_node
from fxjacobi.passes.base import Pass, PassResult
from fxjacobi.passes.escaping import escaping
from fxjacobi.passes.memory_effects import Need, Needs, owns_memory
from fxjacobi.passes.write_history import FEW, Region, WriteHistory, normalised

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["Canonicalize", "canonicalize"]

_aten = torch.ops.aten

_DIMENSIONS: dict[Any, int] = {
    _aten.select.int: 0,
    _aten.slice.Tensor: 0,
    _aten.unbind.int: 0,
    _aten.cat.default: 0,
    _aten.stack.default: 1,
    _aten.unsqueeze.default: 1,
    _aten.squeeze.dim: 0,
    _aten._softmax.default: 0,
    _aten._log_softmax.default: 0,
}
"""Operations whose second argument is a dimension, and by how much their rank exceeds their input's."""

_REWRITTEN = frozenset(
    {
        _aten.select.int, _aten.slice.Tensor, _aten.select_scatter.default, _aten.slice_scatter.default, write,
        _aten.clone.default, _aten._to_copy.default, _aten.unbind.int, _aten.split.Tensor,
        _aten.split_with_sizes.default, _aten.detach.default, _aten.alias.default, _aten.lift_fresh.default,
    }
)  # fmt: skip
"""The operations that rules look at, but ``getitem``, which only follows some of these."""

_WRITES = frozenset({write, _aten.select_scatter.default, _aten.slice_scatter.default})

_ALIGNMENT = 64
"""Bytes to which the allocator aligns every tensor."""


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrite views, copies and reads of written arrays to one form each.

    ``getitem(unbind | split, k)`` becomes a ``select`` or ``slice``; a slice of one element a ``select``; a view that
    changes nothing its argument; nested views of one tensor one ``slice`` or ``select`` a dimension, selects first;
    dimensions and positions count from the front. A read of an array at a written position becomes the value written,
    and one at a position not written since reads the earlier array (``out[:, t] = h; out[:, t - 1]`` is then plain
    dataflow). Copies that the caller cannot tell from the original go; so do ``detach``, ``alias`` and
    ``lift_fresh``, unless ``gradients``. Must not fire where the caller would see two results share memory, nor, if
    ``exact``, where rounding may depend on how the value lies in memory (:mod:`fxjacobi.passes.memory_effects`).
    """

    name = "canonicalize"
    gradients: bool = False
    exact: bool = True

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Rewrite in one walk."""
        result = canonicalize(module, gradients=self.gradients, exact=self.exact)
        return PassResult(result, result is not module)


def canonicalize(module: fx.GraphModule, *, gradients: bool = False, exact: bool = True) -> fx.GraphModule:
    """Return ``module`` in canonical form (see :class:`Canonicalize`), or ``module`` itself if it is already."""
    return module if _is_plain(module) else _Canonicalizer(module, {}, gradients=gradients, exact=exact).run()


def _is_plain(module: fx.GraphModule) -> bool:
    """Whether ``module`` holds no operation that a rule could fire on, but ``select`` as it should be."""
    for node in module.graph.nodes:
        target, args = node.target, node.args
        if node.op == "call_module" and isinstance(module.get_submodule(str(target)), fx.GraphModule):
            return False
        if target in _DIMENSIONS and len(args) > 1 and not (isinstance(args[1], int) and args[1] >= 0):
            return False
        if target is _aten.select.int:
            if not (isinstance(args[2], int) and args[2] >= 0):
                return False
            if isinstance(args[0], fx.Node) and args[0].target is _aten.unsqueeze.default:
                return False
        elif target in _REWRITTEN:
            return False
    return True


class _Canonicalizer:
    """Emits the new graph node by node; ``values`` maps old nodes to new ones."""

    def __init__(
        self, module: fx.GraphModule, submodules: dict[nn.Module, nn.Module], *, gradients: bool, exact: bool
    ) -> None:
        self.module = module
        self.gradients = gradients
        self.exact = exact
        self.needs = Needs()
        self.submodules = submodules
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.history = WriteHistory()
        self.chain: dict[fx.Node, list[fx.Node]] = {}
        self.old = next(iter(module.graph.nodes))
        for node in module.graph.nodes:
            if node.target in _WRITES:
                self.chain[node] = self.chain.get(node.args[0], [])
                self.chain[node].append(node)
        self.escaping = escaping(module.graph)
        self.modified = False
        self.rules: dict[Any, Callable[[fx.Node, tuple[Any, ...]], fx.Node | None]] = {
            operator.getitem: self.getitem,
            _aten.select.int: self.select,
            _aten.slice.Tensor: self.slice,
            _aten.select_scatter.default: self.select_scatter,
            _aten.slice_scatter.default: self.slice_scatter,
            write: self.write,
            _aten.clone.default: self.copy,
            _aten._to_copy.default: self.copy,
            _aten.detach.default: self.detach,
            _aten.alias.default: self.detach,
            _aten.lift_fresh.default: self.detach,
        }

    def run(self) -> fx.GraphModule:
        """Walk the graph."""
        new: dict[str, nn.Module] = {}
        for node in self.module.graph.nodes:
            self.old = node
            rule = self.rules.get(node.target) if node.op == "call_function" else None
            args = fx.map_arg(node.args, self.values.__getitem__)
            if node.target in _DIMENSIONS:
                args = self.positive(node, args)
            made = rule(node, args) if rule is not None else None
            if made is None:
                kwargs = fx.map_arg(node.kwargs, self.values.__getitem__)
                made = copy_node(self.graph, node, args, kwargs)
                if node.op == "call_module":
                    submodule = self.submodule(self.module.get_submodule(str(node.target)))
                    new[str(node.target)] = submodule
                self.note(made)
            elif made.target is not node.target or made.args != args:
                self.modified = True
            self.values[node] = made
        if not self.modified:
            return self.module
        for node in self.graph.nodes:  # what only unpacked a tuple, or led to a view that another replaced
            if node.target in (_aten.unbind.int, _aten.split.Tensor, _aten.split_with_sizes.default) and not node.users:
                self.graph.erase_node(node)
        return assemble(self.graph, self.module, new)

    def submodule(self, submodule: nn.Module) -> nn.Module:
        """The canonical form of a recorded submodule: one for all its calls."""
        if not isinstance(submodule, fx.GraphModule):
            return submodule
        if submodule not in self.submodules:
            self.submodules[submodule] = result = _Canonicalizer(
                submodule, self.submodules, gradients=self.gradients, exact=self.exact
            ).run()
            self.submodules[result] = result
            self.modified |= result is not submodule
        return self.submodules[submodule]

    def positive(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """``args`` with the dimension counted from the front."""
        if len(args) < 2 or type(args[1]) is not int or args[1] >= 0:
            return args
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        spec = spec_of(first)
        assert isinstance(spec, TensorSpec)
        self.modified = True
        return (args[0], args[1] + len(spec.shape) + _DIMENSIONS[node.target], *args[2:])

    def emit(self, target: Any, args: tuple[Any, ...], spec: Spec, site: Site | None) -> fx.Node:
        """Append one operation."""
        return self.note(stamp(self.graph.call_function(target, args), spec, site))

    def note(self, node: fx.Node) -> fx.Node:
        """Tell the history of a new node that writes."""
        if node.target is write:
            base, value, index = node.args
            assert isinstance(base, fx.Node)
            assert isinstance(value, fx.Node)
            spec = tensor(base)
            region = normalised(index, spec.shape)  # type: ignore[arg-type]
            fits = tensor(value).dtype == spec.dtype and region is not None
            if region is not None and fits and tensor(value).shape == _shape(region, spec.shape):
                self.history.write(node, base, value, region, short=len(self.chain[self.old]) <= FEW)
        return node

    # Views

    def getitem(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        source, number = args
        if not isinstance(source, fx.Node) or type(number) is not int:
            return None
        target = source.target
        if target is _aten.unbind.int:
            dim = source.args[1] if len(source.args) > 1 else 0
            return self.select(node, (source.args[0], dim, number))
        if target is _aten.split.Tensor:
            assert isinstance(source.args[0], fx.Node)
            assert isinstance(source.args[1], int)
            dim = self.split_dim(source)
            start = number * source.args[1]
            stop = min(start + source.args[1], tensor(source.args[0]).shape[dim])
            return self.slice(node, (source.args[0], dim, start, stop))
        if target is _aten.split_with_sizes.default:
            sizes: Any = source.args[1]
            start = sum(sizes[:number])
            return self.slice(node, (source.args[0], self.split_dim(source), start, start + sizes[number]))
        return None

    @staticmethod
    def split_dim(node: fx.Node) -> int:
        """The dimension that a split cuts."""
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        assert isinstance(node.args[0], fx.Node)
        assert isinstance(dim, int)
        return dim % len(tensor(node.args[0]).shape)

    def select(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        source, dim, position = args
        if type(dim) is not int or type(position) is not int:
            return None
        size = tensor(source).shape[dim]
        return self.read(node, source, dim, position % size if size else position)

    def slice(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        source, dim, start, stop, step = _filled(args, 1)
        if not all(item is None or type(item) is int for item in (dim, start, stop, step)):
            return None
        size = tensor(source).shape[dim]
        start, stop, step = slice(start, stop, step).indices(size)
        stop = max(start, stop)
        if (start, stop, step) == (0, size, 1):
            return source  # type: ignore[no-any-return]
        if stop - start == 1 or (stop > start and stop - start <= step):
            part = self.read(node, source, dim, start, tensor(node))
            return self.emit(_aten.unsqueeze.default, (part, dim), spec_of(node), site_of(node))
        return self.read(node, source, dim, (start, stop, step))

    def read(
        self,
        node: fx.Node,
        source: fx.Node,
        dim: int,
        entry: int | tuple[int, int, int],
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
        if written is not None and not self.may_move(node, tensor(root), region):
            found, written = root, None
        if written is None and found is root:
            made = self.view(source, dim, entry, node)
            self.history.note_part(made, root, region)
            return made
        made = self.at(found, region if written is None else _within(region, written), node)
        if written is None:
            self.history.note_part(made, found, region)
        return self.laid_out(made, spec, node)

    def may_move(self, node: fx.Node, array: TensorSpec, region: Region) -> bool:
        """Whether ``node``, an array at ``region``, may be read from a tensor of its own.

        Where alignment may matter it may if all positions of the array are aligned as a tensor is: some would not do,
        for then one loop would read its array in two ways.
        """
        if not self.exact or self.needs.of(node) < Need.ALIGNMENT:
            return True
        return all(
            entry is None or stride * array.dtype.itemsize % _ALIGNMENT == 0
            for entry, stride in zip(region, array.stride, strict=True)
        )

    def laid_out(self, made: fx.Node, spec: TensorSpec, node: fx.Node) -> fx.Node:
        """``made`` in ``spec``'s memory layout, if something that reads it may round by layout."""
        need = self.needs.of(node) if self.exact else Need.ELEMENTS
        if need is Need.ELEMENTS or (_same_layout(tensor(made), spec) and (need is Need.LAYOUT or owns_memory(made))):
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

    def read_plain(self, source: fx.Node, dim: int, entry: int | tuple[int, int, int], node: fx.Node) -> fx.Node:
        """One view, noted as a part of a written array if it is one."""
        part = self.history.part(source, len(tensor(source).shape), dim, entry)
        made = self.view(source, dim, entry, node)
        if part is not None:
            self.history.note_part(made, *part)
        return made

    def view(self, source: fx.Node, dim: int, entry: int | tuple[int, int, int], node: fx.Node) -> fx.Node:
        """Emit a ``select`` or ``slice``, merged with the views that ``source`` is made by."""
        spec, site = tensor(source), site_of(node)
        if source.target is _aten.unsqueeze.default and source.args[1] == dim and isinstance(entry, int):
            assert isinstance(source.args[0], fx.Node)
            return source.args[0]
        if source.target is _aten.slice.Tensor:
            inner, at, start, _, step = _slice_args(source)
            if at == dim:
                if isinstance(entry, int):
                    return self.view(inner, dim, start + entry * step, node)
                begin, end = start + entry[0] * step, start + (entry[1] - 1) * step + 1
                if entry[1] > entry[0]:
                    return self.view(inner, dim, (begin, end, step * entry[2]), node)
            elif isinstance(entry, int):  # selects before slices
                chosen = self.view(inner, dim, entry, node)
                return self.view(chosen, at - (dim < at), _slice_args(source)[2:], node)
        if isinstance(entry, int):
            return self.emit(_aten.select.int, (source, dim, entry), selected(spec, dim), site)
        start, stop, step = entry
        size = (stop - start + step - 1) // step
        shape = (*spec.shape[:dim], size, *spec.shape[dim + 1 :])
        stride = (*spec.stride[:dim], spec.stride[dim] * step, *spec.stride[dim + 1 :])
        args = (source, dim, start, stop) if step == 1 else (source, dim, start, stop, step)
        return self.emit(_aten.slice.Tensor, args, dense(spec, shape, stride), site)

    # Writes and copies

    def select_scatter(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        base, value, dim, position = args
        if type(dim) is not int or type(position) is not int:
            return None
        return self.scatter(node, base, value, dim, position)

    def slice_scatter(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        base, value, dim, start, stop, step = _filled(args, 2)
        if not all(item is None or type(item) is int for item in (dim, start, stop, step)):
            return None
        return self.scatter(node, base, value, dim, slice(start, stop, step).indices(tensor(base).shape[dim]))

    def scatter(self, node: fx.Node, base: fx.Node, value: fx.Node, dim: int, entry: Any) -> fx.Node | None:
        if not _same_layout(tensor(base), tensor(node)) or tensor(value).dtype != tensor(base).dtype:
            return None
        dim %= len(tensor(base).shape)
        return self.write(node, (base, value, (*[None] * dim, entry)))

    def write(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        base, value, index = args
        spec = tensor(base)
        if any(
            isinstance(item, fx.Node) for entry in index for item in (entry if isinstance(entry, tuple) else (entry,))
        ):
            return None
        region = normalised(index, spec.shape)
        if region is None:
            return None
        whole = all(entry is None for entry in region) and tensor(value).shape == spec.shape
        if whole and tensor(value).dtype == spec.dtype and node not in self.escaping:
            return self.laid_out(value, tensor(node), node)
        while region and region[-1] is None:
            region = region[:-1]
        if node.target is write and region == tuple(index):
            return None
        return self.emit(write, (base, value, region), spec_of(node), site_of(node))

    def copy(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        """A copy with no other dtype, device or layout is its argument."""
        source = args[0]
        before, after = tensor(source), tensor(node)
        if node in self.escaping or (before.dtype, before.device) != (after.dtype, after.device):
            return None
        if self.exact and self.needs.of(node) is Need.ALIGNMENT and not owns_memory(source):
            return None
        return source if _same_layout(before, after) else None

    def detach(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        if node in self.escaping or (self.gradients and node.target is _aten.detach.default):
            return None
        return args[0]  # type: ignore[no-any-return]


def tensor(node: fx.Node) -> TensorSpec:
    """The spec of a node that is a tensor."""
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec), node
    return spec


def _same_layout(a: TensorSpec, b: TensorSpec) -> bool:
    """Whether two specs lay their elements out alike (a dimension of one element may have any stride)."""
    if a.shape != b.shape:
        return False
    if is_contiguous(a) and is_contiguous(b):
        return True
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride, b.stride, strict=True))


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


def _filled(args: tuple[Any, ...], leading: int) -> tuple[Any, ...]:
    """The arguments of a slice with its defaults, ``leading`` of them before the dimension."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    return args + defaults[len(args) - leading :]


def _slice_args(node: fx.Node) -> tuple[fx.Node, int, int, int, int]:
    """A canonical slice's tensor, dimension, start, stop and step."""
    source, dim, start, stop, step = _filled(node.args, 1)
    return source, dim, start, stop, step
