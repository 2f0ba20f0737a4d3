"""Give every construct one spelling, so that later passes meet few forms and equal code looks equal."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi.assemble import assemble, copy_node
from fxjacobi.emit import infer, is_view
from fxjacobi.graph import TensorSpec, site_of, spec_of
from fxjacobi.layouts import dense, in_one_order, lie_alike
from fxjacobi.ops import restride, write
from fxjacobi.passes.array_reads import ArrayReads, filled, tensor
from fxjacobi.passes.base import Pass, PassResult
from fxjacobi.passes.memory_effects import WRITES, Need, keeps_layout
from fxjacobi.passes.write_history import normalised

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
        return PassResult.of(canonicalize(module, gradients=self.gradients, exact=self.exact), module)


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
        self.submodules = submodules
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.reads = ArrayReads(self.graph, module.graph, exact=exact)
        self.escaping = self.reads.escaping
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
            rule = self.rules.get(node.target) if node.op == "call_function" else None
            args = fx.map_arg(node.args, self.values.__getitem__)
            if node.target in _DIMENSIONS:
                args = self.positive(node, args)
            made = rule(node, args) if rule is not None else None
            if made is None:
                made = self.copy_of(node, args)
                if node.op == "call_module":
                    submodule = self.submodule(self.module.get_submodule(str(node.target)))
                    new[str(node.target)] = submodule
                self.reads.note(made, node)
            elif made.target is not node.target or made.args != args:
                self.modified = True
            self.values[node] = made
        if not self.modified:
            return self.module
        for node in self.graph.nodes:  # what only unpacked a tuple, or led to a view that another replaced
            if node.target in (_aten.unbind.int, _aten.split.Tensor, _aten.split_with_sizes.default) and not node.users:
                self.graph.erase_node(node)
        return assemble(self.graph, self.module, new)

    def copy_of(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        """``node`` itself, with a spec that follows those of its arguments: they may lie otherwise than the old ones."""
        kwargs = fx.map_arg(node.kwargs, self.values.__getitem__)
        spec = spec_of(node) if node.op != "output" else None
        if keeps_layout(node) and isinstance(spec, TensorSpec) and self.follows_moved(node):
            try:
                spec = infer(node.target, args, kwargs)  # type: ignore[arg-type]
            except RuntimeError:  # a view that there is of the old argument only
                source = node.args[0]
                assert isinstance(source, fx.Node)
                before = tensor(source)
                args = (self.reads.emit(restride, (args[0], before.stride), before, site_of(node)), *args[1:])
        copy = copy_node(self.graph, node, args, kwargs)
        if node.op != "output":
            copy.meta["spec"] = spec
        return copy

    def follows_moved(self, node: fx.Node) -> bool:
        """Whether the strides of ``node`` follow from those of an argument for which something lies otherwise now."""
        alike = (
            lie_alike if is_view(node) or node.target in WRITES else in_one_order
        )  # what works by element leaves no gaps
        for each in node.all_input_nodes:
            before, after = spec_of(each), spec_of(self.values[each])
            tensors = isinstance(before, TensorSpec) and isinstance(after, TensorSpec)
            if before is not after and tensors and not alike(tensor(each), tensor(self.values[each])):
                return True
        return False

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
        return self.reads.read(node, source, dim, position % size if size else position)

    def slice(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        source, dim, start, stop, step = filled(args, 1)
        if not all(item is None or type(item) is int for item in (dim, start, stop, step)):
            return None
        size = tensor(source).shape[dim]
        start, stop, step = slice(start, stop, step).indices(size)
        stop = max(start, stop)
        if (start, stop, step) == (0, size, 1):
            return source  # type: ignore[no-any-return]
        if stop - start == 1 or (stop > start and stop - start <= step):
            part = self.reads.read(node, source, dim, start, tensor(node))
            spec = tensor(part)
            shape = (*spec.shape[:dim], 1, *spec.shape[dim:])
            step = spec.stride[dim] * spec.shape[dim] if dim < len(spec.shape) else 1
            kept = dense(spec, shape, (*spec.stride[:dim], step, *spec.stride[dim:]))
            return self.reads.emit(_aten.unsqueeze.default, (part, dim), kept, site_of(node))
        return self.reads.read(node, source, dim, (start, stop, step))

    # Writes and copies

    def select_scatter(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        base, value, dim, position = args
        if type(dim) is not int or type(position) is not int:
            return None
        return self.scatter(node, base, value, dim, position)

    def slice_scatter(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        base, value, dim, start, stop, step = filled(args, 2)
        if not all(item is None or type(item) is int for item in (dim, start, stop, step)):
            return None
        return self.scatter(node, base, value, dim, slice(start, stop, step).indices(tensor(base).shape[dim]))

    def scatter(self, node: fx.Node, base: fx.Node, value: fx.Node, dim: int, entry: Any) -> fx.Node | None:
        if not lie_alike(tensor(base), tensor(node)) or tensor(value).dtype != tensor(base).dtype:
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
        aligned = not self.exact or self.reads.needs.of(node) < Need.ALIGNMENT or self.reads.aligned(base)
        if whole and tensor(value).dtype == spec.dtype and node not in self.escaping and aligned:
            return self.reads.laid_out(value, tensor(node), node)
        while region and region[-1] is None:
            region = region[:-1]
        if node.target is write and region == tuple(index):
            return None
        repeats = any(step == 0 and size > 1 for size, step in zip(spec.shape, spec.stride, strict=True))
        laid = spec_of(node) if repeats else spec  # a written array lies as before; repeated elements get memory
        made = self.reads.emit(write, (base, value, region), laid, site_of(node))
        return self.reads.note(made, node)

    def copy(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        """A copy with no other dtype, device or layout is its argument."""
        source = args[0]
        before, after = tensor(source), tensor(node)
        if node in self.escaping or (before.dtype, before.device) != (after.dtype, after.device):
            return None
        if self.exact and self.reads.needs.of(node) is Need.ALIGNMENT and not self.reads.aligned(source):
            return None
        return source if lie_alike(before, after) else None

    def detach(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
        if node in self.escaping or (self.gradients and node.target is _aten.detach.default):
            return None
        return args[0]  # type: ignore[no-any-return]
