"""Writing a graph node by node, of several runs at once: the same operations on other values."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi.graph import TensorSpec, operation_of, spec_of
from fxjacobi.lowered import lowered
from fxjacobi.native import pointwise, products, reductions, views  # noqa: F401 - they register their rules
from fxjacobi.native.emitter import NoMachineFormError, NotSplitError
from fxjacobi.native.rules import RULES, TOGETHER
from fxjacobi.native.values import Value, remembered

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fxjacobi.native.emitter import Emitter

__all__ = ["GraphWriter"]


class GraphWriter:
    """Writes graphs of ATen calls.

    Args:
        emitter: Where to.
    """

    def __init__(self, emitter: Emitter) -> None:
        self.emitter = emitter

    def graph(self, module: fx.GraphModule, runs: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Write the graph for each run's arguments and return each run's outputs: values, or Python's numbers.

        Raises:
            NoMachineFormError: An operation has no machine form.
        """
        placeholders = iter(zip(*runs, strict=True))
        values: dict[fx.Node, Sequence[Any]] = {}
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(placeholders)
            elif node.op == "call_function":
                values[node] = self._settled(node, self._call(node, values, len(runs)))
            elif node.op != "output":
                raise NoMachineFormError(f"{node.op} {node.target}")
        outputs = module.graph.output_node().args[0]
        flat = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        return [[values[o][run] if isinstance(o, fx.Node) else o for o in flat] for run in range(len(runs))]

    def _settled(self, node: fx.Node, found: Sequence[Any]) -> Sequence[Any]:
        """What several read is computed once."""
        if _readings(node) < 2 or not all(isinstance(v, Value) and not v.cheap for v in found):
            return found
        if _same(found):
            return [remembered(self.emitter, found[0])] * len(found)
        return [remembered(self.emitter, v) for v in found]

    def _call(self, node: fx.Node, values: dict[fx.Node, Sequence[Any]], runs: int) -> Sequence[Any]:
        read = [
            fx.map_arg((node.args, node.kwargs), lambda n, run=run: values[n][run])  # type: ignore[misc]
            for run in range(runs)
        ]
        if _same([_leaves(r) for r in read]):
            return self._written(node, read[:1]) * runs
        return self._written(node, read)

    def _written(self, node: fx.Node, read: Sequence[Any]) -> list[Any]:
        if node.target is operator.getitem:
            return [args[0][args[1]] for args, _ in read]
        spec = spec_of(node)
        if any(
            isinstance(one, TensorSpec) and 0 in one.shape for one in (spec if isinstance(spec, tuple) else (spec,))
        ):
            raise NoMachineFormError("a tensor without elements")
        for args, kwargs in read:
            _check_numbers(node, args, kwargs)
        rule, together = RULES.find(node.target), TOGETHER.find(node.target)
        if rule is None and together is None:
            return self._decomposed(node, read)
        first = spec[0] if isinstance(spec, tuple) else spec
        if not isinstance(first, TensorSpec):
            raise NoMachineFormError(f"{operation_of(node)} returns no tensor")
        if together is not None:
            return together(self.emitter, first, [(args, kwargs) for args, kwargs in read])
        assert rule is not None
        return [rule(self.emitter, first, *args, **kwargs) for args, kwargs in read]

    def _decomposed(self, node: fx.Node, read: Sequence[Any]) -> list[Any]:
        """Write an operation without a rule as those that PyTorch's own decomposition makes of it."""
        for args, kwargs in read:
            _check_numbers(node, args, kwargs, among=("Tensor", "Optional[Tensor]"))
        function = _decomposition(node)
        places: list[Value] = []
        template = _mapped(read[0], lambda v: _Place(places, v) if isinstance(v, Value) else v)

        def call(*given: torch.Tensor) -> Any:
            args, kwargs = _mapped(template, lambda v: given[v.number] if isinstance(v, _Place) else v)
            return function(*args, **kwargs)

        examples = [torch.full(v.shape, 0.5 if v.dtype.is_floating_point else True, dtype=v.dtype) for v in places]
        found = lowered(call, *examples)
        if any(n.target is node.target for n in found.graph.nodes):
            raise NoMachineFormError(f"{operation_of(node)} has no machine form")
        arguments = [[v for v in _leaves(each) if isinstance(v, Value)] for each in read]
        for place, placeholder in enumerate(n for n in found.graph.nodes if n.op == "placeholder"):
            settled = self._settled(placeholder, [run[place] for run in arguments])
            for run, value in zip(arguments, settled, strict=True):
                run[place] = value
        try:
            outputs = self.graph(found, arguments)
        except NotSplitError:
            raise
        except NoMachineFormError as why:
            raise NoMachineFormError(f"{operation_of(node)} has no machine form ({why})") from why
        return outputs if isinstance(spec_of(node), tuple) else [o[0] for o in outputs]


def _decomposition(node: fx.Node) -> Callable[..., Any]:
    from torch._decomp import decomposition_table  # imports a good part of torch.compile

    target = node.target
    function: Any = decomposition_table.get(target)  # type: ignore[call-overload]
    if function is None and isinstance(target, torch._ops.OpOverload):
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
        function = target if composite else None
    if function is None:
        raise NoMachineFormError(f"{operation_of(node)} has no machine form")
    return function  # type: ignore[no-any-return]


def _readings(node: fx.Node) -> int:
    """Return how often a node's value is read."""
    return sum(_leaves((user.args, user.kwargs)).count(node) for user in node.users)


class _Place:
    """Where a tensor stands among arguments."""

    def __init__(self, places: list[Value], value: Value) -> None:
        self.number = len(places)
        places.append(value)


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, (tuple, list)):  # named tuples too, as plain ones
        mapped = [_mapped(v, function) for v in value]
        return mapped if isinstance(value, list) else tuple(mapped)
    if isinstance(value, dict):
        return {k: _mapped(v, function) for k, v in value.items()}
    return function(value)


def _leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    _mapped(value, found.append)
    return found


def _same(values: Sequence[Any]) -> bool:
    """Whether all are the same value, or lists of the same values."""
    first = values[0] if isinstance(values[0], list) else values[:1]
    return all(
        len(v) == len(first) and all(a is b for a, b in zip(v, first, strict=True))
        for v in (w if isinstance(w, list) else [w] for w in values[1:])
    )


def _check_numbers(
    node: fx.Node,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    among: Sequence[str] = ("Tensor", "number", "Optional[Tensor]"),
) -> None:
    """Refuse a number that is another at each step where an operation wants one that is known (a size, a factor)."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    kinds = {a.name: str(a.type) for a in node.target._schema.arguments}
    given = [*zip(kinds, args, strict=False), *kwargs.items()]
    if any(
        isinstance(v, Value) and kinds[name] not in (among if name not in kwargs else ("Tensor",)) for name, v in given
    ):
        raise NoMachineFormError(f"{operation_of(node)} with a number that is another at each step")
