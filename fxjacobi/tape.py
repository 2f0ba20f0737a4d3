"""A straight graph as integer arrays, so that repeats in it can be found by comparing arrays with themselves.

Nodes that compute are numbered ``0 .. N-1`` in program order (the output node is ``N``); placeholders and
``get_attr`` nodes are *leaves*, numbered ``-1, -2, ...``: a reference smaller than a position is a value that is
there before it, whichever of the two it is. The arguments of all nodes, flattened, form one long row of *slots*.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import fx

from fxjacobi.graph import TensorSpec, is_random
from fxjacobi.ops import GUARDS

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

__all__ = ["FREE", "Integers", "Tape", "literal_key", "rebuild", "tabulate"]

Integers: TypeAlias = "npt.NDArray[np.int64]"

NOT_A_SELECT = np.iinfo(np.int64).max
"""The ``select_base`` of a node that is no ``select`` by a literal index."""

_aten = torch.ops.aten
FREE = frozenset(
    {
        _aten.select.int, _aten.slice.Tensor, _aten.view.default, _aten.reshape.default, _aten._unsafe_view.default,
        _aten.unsqueeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.squeeze.default, _aten.permute.default,
        _aten.transpose.int, _aten.t.default, _aten.expand.default, _aten.detach.default, _aten.alias.default,
        _aten.as_strided.default, _aten.diagonal.default, _aten.unfold.default, _aten.unbind.int,
        _aten.split.Tensor, _aten.split_with_sizes.default, _aten.lift_fresh.default, _aten.empty.memory_format,
        _aten.zeros.default, _aten.ones.default, _aten.full.default, _aten.zeros_like.default, _aten.full_like.default,
        _aten.ones_like.default, _aten.empty_like.default, _aten.scalar_tensor.default, _aten.arange.start_step,
        operator.getitem, *GUARDS,
    }
)  # fmt: skip
"""Operations that move no data or take none: a body of these alone is not worth a loop."""


@dataclass(frozen=True, slots=True, eq=False)
class Tape:
    """A graph's computing nodes in order, with their labels and flattened arguments.

    Two nodes have one label if they run the same operation (or submodule) on arguments of the same structure, specs
    (strides aside) and literal types, with results of the same spec. Literal *values* are not in the label. A random
    draw has a label of its own. The slots of node ``i`` are ``first[i] .. first[i + 1] - 1``; a slot's value is a
    reference, or an index into ``literals`` where ``literal`` holds.
    """

    nodes: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]
    labels: Integers
    first: Integers
    values: Integers
    owner: Integers
    literal: npt.NDArray[np.bool_]
    literals: tuple[Any, ...]
    computes: npt.NDArray[np.bool_]
    select_base: Integers
    select_dim: Integers
    select_index: Integers

    def node(self, reference: int) -> fx.Node:
        """The node of a reference."""
        return self.nodes[reference] if reference >= 0 else self.leaves[-1 - reference]


def literal_key(value: Any) -> Any:
    """A key under which literals are equal only if type and bits are (``1``, ``1.0``, ``True``; ``0.0``, ``-0.0``)."""
    kind = type(value)
    if kind is float or kind is complex:
        return kind, repr(value)
    if kind in (list, tuple) or isinstance(value, (list, tuple)):
        return (tuple, *map(literal_key, value))
    if isinstance(value, slice):
        return slice, literal_key((value.start, value.stop, value.step))
    if isinstance(value, dict):
        return dict, tuple((name, literal_key(item)) for name, item in value.items())
    return kind, value


def rebuild(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return the argument ``value`` with each leaf (node or literal) replaced, in the order of a tape's slots."""
    if isinstance(value, (list, tuple)):
        items = [rebuild(item, leaf) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {name: rebuild(item, leaf) for name, item in value.items()}
    if isinstance(value, slice):
        return slice(leaf(value.start), leaf(value.stop), leaf(value.step))
    return leaf(value)


class _Tabulator:
    """Collects a tape's rows; specs, labels and literals get numbers in order of first sight."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.specs: dict[Any, int] = {}
        self.labels: dict[Any, int] = {}
        self.literal_numbers: dict[Any, int] = {}
        self.submodules: dict[str, int] = {}
        self.unique = itertools.count(-1, -1)
        self.reference: dict[fx.Node, int] = {}
        self.spec_id: dict[fx.Node, int] = {}
        self.literals: list[Any] = []
        self.values: list[int] = []
        self.literal: list[bool] = []

    def spec(self, spec: Any) -> int:
        """The number of a spec, strides aside."""
        if type(spec) is TensorSpec:
            key: Any = (spec.shape, spec.dtype, spec.device)
        elif isinstance(spec, tuple):
            key = tuple(self.spec(item) for item in spec)
        else:
            key = None
        return self.specs.setdefault(key, len(self.specs))

    def add_literal(self, value: Any) -> None:
        """Append a slot that holds a literal."""
        kind = type(value)
        key = (kind, repr(value)) if kind is float or kind is complex else (kind, value)
        found = self.literal_numbers.get(key)
        if found is None:
            found = self.literal_numbers[key] = len(self.literals)
            self.literals.append(value)
        self.values.append(found)
        self.literal.append(True)

    def flatten(self, value: Any, structure: list[Any]) -> None:
        """Append the slots of an argument, and to ``structure`` what of it is part of the label."""
        if isinstance(value, fx.Node):
            structure.append(self.spec_id[value])
            self.values.append(self.reference[value])
            self.literal.append(False)
        elif isinstance(value, (list, tuple)):
            structure.append((len(value),))
            for item in value:
                self.flatten(item, structure)
        elif isinstance(value, dict):
            structure.append(tuple(value))
            for item in value.values():
                self.flatten(item, structure)
        elif isinstance(value, slice):
            structure.append(slice)
            for item in (value.start, value.stop, value.step):
                self.flatten(item, structure)
        else:
            structure.append(type(value))
            self.add_literal(value)

    def label(self, node: fx.Node, structure: list[Any]) -> int:
        """The label of a node; a draw and the output have one of their own."""
        if node.op == "output" or is_random(node):
            return next(self.unique)
        kind: Any = node.target
        if node.op == "call_module":
            if kind not in self.submodules:
                self.submodules[kind] = id(self.module.get_submodule(kind))
            kind = self.submodules[kind]
        return self.labels.setdefault((kind, self.spec_id[node], *structure), len(self.labels))


def tabulate(module: fx.GraphModule) -> Tape:
    """Return the tape of ``module``'s graph, in time linear in its nodes and arguments."""
    rows = _Tabulator(module)
    nodes: list[fx.Node] = []
    leaves: list[fx.Node] = []
    labels: list[int] = []
    first = [0]
    computes: list[bool] = []
    selects: list[tuple[int, int, int]] = []
    nothing = (NOT_A_SELECT, 0, 0)
    for node in module.graph.nodes:
        rows.spec_id[node] = -1 if node.op == "output" else rows.spec(node.meta["spec"])
        if node.op == "placeholder" or node.op == "get_attr":
            leaves.append(node)
            rows.reference[node] = -len(leaves)
            continue
        args, kwargs = node.args, node.kwargs
        structure: list[Any] = [len(args)]
        for item in args:
            rows.flatten(item, structure)
        if kwargs:
            rows.flatten(kwargs, structure)
        labels.append(rows.label(node, structure))
        select = nothing
        if node.target is _aten.select.int and type(args[1]) is int and type(args[2]) is int:
            assert isinstance(args[0], fx.Node)
            select = (rows.reference[args[0]], args[1], args[2])
        selects.append(select)
        computes.append(node.target not in FREE and node.op != "output")
        rows.reference[node] = len(nodes)
        nodes.append(node)
        first.append(len(rows.values))

    starts = np.asarray(first, dtype=np.int64)
    columns = np.asarray(selects, dtype=np.int64).reshape(len(nodes), 3)
    return Tape(
        nodes=tuple(nodes),
        leaves=tuple(leaves),
        labels=np.asarray(labels, dtype=np.int64),
        first=starts,
        values=np.asarray(rows.values, dtype=np.int64),
        owner=np.repeat(np.arange(len(nodes), dtype=np.int64), np.diff(starts)),
        literal=np.asarray(rows.literal, dtype=np.bool_),
        literals=tuple(rows.literals),
        computes=np.asarray(computes, dtype=np.bool_),
        select_base=columns[:, 0].copy(),
        select_dim=columns[:, 1].copy(),
        select_index=columns[:, 2].copy(),
    )
