"""TorchScript source of graphs and loops, written top down: each node of a graph becomes one line."""

from __future__ import annotations

import operator
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi import ops
from fxjacobi.batched import BatchedMap
from fxjacobi.graph import TensorSpec
from fxjacobi.in_place import in_place_writes
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Stacked, Step, Table
from fxjacobi.script_text import HELPERS, OWN, TENSOR_TO_SCALAR, Bools, Constant, NotScriptableError, overloads, text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["ScriptWriter"]


_LARGEST_DISTANCE = 16
"""Registers that a carry may take; loops that reach further back stay in Python."""


def _require_tensor(node: fx.Node) -> None:
    if not isinstance(node.meta.get("spec"), TensorSpec) and not isinstance(node.meta.get("val"), torch.Tensor):
        raise NotScriptableError(f"{node.name} is no tensor")


class ScriptWriter:
    """Source text of one function, written from the top.

    With ``in_place``, arrays that a loop carries are written without a copy at each step where nobody can tell
    (:mod:`fxjacobi.in_place`); autograd can.

    A value of a graph is the name of its variable, a :class:`Constant`, or a list of these where a nested graph
    returned several.
    """

    def __init__(self, *, in_place: bool = False) -> None:
        self._in_place = in_place
        self._reused: set[fx.Node] = set()
        """Writes that go into the array itself."""
        self._lines: list[str] = []
        self._parameters: list[str] = []
        self._constant_lines: dict[str, str] = {}
        self._depth = 1
        self._names = 0
        self._wanted: Counter[str] = Counter()
        self._numbers: set[str] = set()
        """Expressions that are numbers."""
        self._guards: dict[str, tuple[Any, ...]] = {}
        """Lists that collect what a guard looks at, and what it must be at each step of the loops around it."""
        self._of_step: set[str] = set()
        """Guards that are to find something else at each step of the loop that they stand in."""
        self._literals: dict[fx.Node, tuple[Any, ...]] = {}
        """Placeholders that are numbers of the step."""

    # -- the pieces -----------------------------------------------------------------------------------------------

    def parameter(self, kind: str) -> str:
        """Add a parameter of a TorchScript type and return its name."""
        name = self._name()
        self._parameters.append(f"{name}: {kind}")
        return name

    def _name(self) -> str:
        self._names += 1
        return f"v{self._names}"

    def _line(self, text: str) -> None:
        self._lines.append("    " * self._depth + text)

    def _constant(self, kind: str, text: str) -> str:
        """A list that is built once a call, before all loops."""
        key = f"{kind} = {text}"
        if key not in self._constant_lines:
            self._constant_lines[key] = self._name()
        return self._constant_lines[key]

    def tensor_of(self, value: Any) -> str:
        """Return the name of a value that must be a tensor."""
        if not isinstance(value, str):
            raise NotScriptableError(f"an output is {value!r}, no tensor")
        return value

    @property
    def expected(self) -> list[tuple[Any, ...]]:
        """What each of the guards' stacks, which come after the outputs, must hold."""
        return list(self._guards.values())

    def finish(self, outputs: Sequence[str]) -> Callable[..., Any]:
        """Compile, and check that every operation became the overload that the graph names."""
        head = f"def run({', '.join(self._parameters)}) -> List[Tensor]:"
        constants = [f"    {name}: {key}" for key, name in self._constant_lines.items()]
        constants += [f"    {name}: List[Tensor] = []" for name in self._guards]
        returned = [*outputs, *(f"torch.ops.aten.stack({name})" for name in self._guards)]
        self._wanted["aten::stack"] += len(self._guards)
        text = "\n".join([head, *constants, *self._lines, f"    return [{', '.join(returned)}]"])
        try:
            unit = torch.jit.CompilationUnit(f"{HELPERS}\n{text}\n")
        except RuntimeError as error:
            raise NotScriptableError(f"TorchScript does not take it: {str(error).strip().splitlines()[0]}") from error
        function: Callable[..., Any] = unit.run
        found = overloads(function.graph)  # type: ignore[attr-defined]
        for name, count in found.items():
            # What nobody reads is left out; what nobody asked for is another overload.
            if count > self._wanted[name] and name not in OWN:
                raise NotScriptableError(f"an operation resolves to another overload, {name}")
        return function

    # -- a graph --------------------------------------------------------------------------------------------------

    def graph(self, module: fx.GraphModule, arguments: Sequence[Any]) -> list[Any]:
        """Write the graph's operations; ``arguments`` and the result hold names (``str``) or Python constants."""
        values: dict[fx.Node, Any] = {}
        rest = iter(arguments)
        for node in module.graph.nodes:
            match node.op:
                case "placeholder":
                    values[node] = next(rest)
                case "call_function":
                    values[node] = self._call(node, values)
                case "call_module":
                    inner = module.get_submodule(str(node.target))
                    given = [values[a] if isinstance(a, fx.Node) else Constant(a) for a in node.args]
                    values[node] = self._inner(inner, given)
                case "output":
                    return [values[a] if isinstance(a, fx.Node) else Constant(a) for a in node.args[0]]
                case _:
                    raise NotScriptableError(f"{node.op} {node.target}")
        raise NotScriptableError("the graph has no output")

    def _inner(self, inner: torch.nn.Module, given: list[Any]) -> list[Any]:
        if isinstance(inner, fx.GraphModule):
            return self.graph(inner, given)
        if isinstance(inner, BatchedMap):
            return self.graph(inner.batched, given)
        loop = inner if isinstance(inner, Loop) else getattr(inner, "in_order", None)
        if isinstance(loop, Loop):
            names = {i: self.tensor_of(g) for i, g in enumerate(given)}
            return list(self.loop(loop, names, [self._registers(b, names) for b in loop.bindings], "0", inner=True))
        raise NotScriptableError(f"it holds a {type(inner).__name__}")

    def _call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        target = node.target
        if target is operator.getitem:
            source, index = node.args
            whole = values[source]  # type: ignore[index]
            if isinstance(whole, list):
                return whole[index]  # type: ignore[index]
            return self._bind(f"{whole}[{index}]")
        if target is ops.write:
            return self._write(node, values)
        if target is ops.guard:
            return self._guard(node, values)
        if target is ops.restride:
            value, stride = node.args
            return self._bind(f"fxjacobi_restride({self._argument(value, values)}, {text(stride)})")
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            raise NotScriptableError(f"{getattr(target, '__name__', target)} has no TorchScript form")
        schema = target._schema
        if torch.Tag.nondeterministic_seeded in target.tags or schema.is_mutable:
            raise NotScriptableError(f"{target} draws or writes")
        for argument, value in zip(schema.arguments, node.args, strict=False):
            known = values[value] if isinstance(value, fx.Node) else value
            known = known.value if isinstance(known, Constant) else known
            if type(known) is bool and str(argument.type) in ("Tensor", "number"):
                raise NotScriptableError("a bool beside a tensor, which TorchScript makes an integer")
        arguments = [self._argument(a, values) for a in node.args]
        arguments += [f"{name}={self._argument(value, values)}" for name, value in node.kwargs.items()]
        self._wanted[self._overload(target, node, values)] += 1
        name = schema.name.removeprefix("aten::")
        return self._bind(f"torch.ops.aten.{name}({', '.join(arguments)})")

    def _overload(self, target: torch._ops.OpOverload, node: fx.Node, values: dict[fx.Node, Any]) -> str:
        schema = target._schema
        name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        second = node.args[1] if len(node.args) > 1 else None
        second = values[second] if isinstance(second, fx.Node) else second
        second = second.value if isinstance(second, Constant) else second
        number = isinstance(second, (int, float, complex)) or (isinstance(second, str) and second in self._numbers)
        return TENSOR_TO_SCALAR.get(name, name) if number else name

    def _bind(self, expression: str) -> str:
        name = self._name()
        self._line(f"{name} = {expression}")
        return name

    def _argument(self, value: Any, values: dict[fx.Node, Any]) -> str:
        if isinstance(value, fx.Node):
            found = values[value]
            if isinstance(found, Constant):
                return text(found.value)
            if isinstance(found, (list, Bools)):
                raise NotScriptableError("a tuple, or a bool of the step, is an argument")
            return str(found)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(self._argument(v, values) for v in value)}]"
        return text(value)

    def _guard(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Collect what the guard looks at: it is checked when the steps are done, which is soon enough."""
        value, expected = node.args
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("spec"), TensorSpec):
            raise NotScriptableError("a guard on what is no tensor")
        if isinstance(expected, fx.Node):
            known = values[expected]
            wanted = self._literals.get(expected, (known.value,) if isinstance(known, Constant) else ())
            if not wanted:
                raise NotScriptableError("a guard whose expectation is computed")
        else:
            wanted = (expected,)
        name = self._name()
        self._guards[name] = wanted
        if isinstance(expected, fx.Node) and expected in self._literals:
            self._of_step.add(name)
        self._line(f"{name}.append({self._argument(value, values)})")

    def _write(self, node: fx.Node, values: dict[fx.Node, Any]) -> str:
        base, value, index = node.args
        if not isinstance(value, fx.Node) or not isinstance(index, (tuple, list)):
            raise NotScriptableError("a write of a number")
        written = self._argument(value, values)
        if node in self._reused:
            # The value may be a view of the array.
            name, written = self._argument(base, values), self._bind(f"{written}.clone()")
            self._wanted["aten::clone"] += 1
        else:
            name = self._bind(f"fxjacobi_copy({self._argument(base, values)})")
        part, dim = name, 0
        for entry in index:
            if entry is None:
                dim += 1
            elif isinstance(entry, (tuple, list)):
                start, stop, step = (self._argument(e, values) for e in entry)
                part = self._bind(f"torch.ops.aten.slice({part}, {dim}, {start}, {stop}, {step})")
                dim += 1
            else:
                part = self._bind(f"torch.ops.aten.select({part}, {dim}, {self._argument(entry, values)})")
        self._wanted["aten::slice.Tensor"] += sum(isinstance(e, (tuple, list)) for e in index)
        self._wanted["aten::select.int"] += sum(not isinstance(e, (tuple, list)) and e is not None for e in index)
        self._line(f"{part}.copy_({written})")
        return name

    # -- a loop ---------------------------------------------------------------------------------------------------

    def loop(
        self,
        loop: Loop,
        operands: dict[int, str],
        registers: list[list[str]],
        start: str,
        dim: int = 0,
        *,
        inner: bool = False,
    ) -> list[str]:
        """Write the loop and return the names of its results.

        Args:
            loop: The loop.
            operands: Names by index.
            registers: For each carried binding, variables with the values of the steps before, the oldest first.
            start: The first step.
            dim: Where stacked results hold the steps.
            inner: Whether it is in another loop's body: then nobody has aligned the rows of the stacks that it owns.
        """
        if any(len(names) > _LARGEST_DISTANCE for names in registers):
            raise NotScriptableError(f"a carry reaches more than {_LARGEST_DISTANCE} steps back")
        placeholders = [n for n in loop.body.graph.nodes if n.op == "placeholder"]
        stacked = {r.output: self._name() for r in loop.results if isinstance(r, Stacked)}
        kept = {r: self._name() for r in loop.results if isinstance(r, Step)}
        for name in (*stacked.values(), *kept.values()):
            self._line(f"{name}: List[Tensor] = []")
        tables = {
            b: self._bind(f"[{', '.join(operands[o] for o in b.operands)}]")
            for b in loop.bindings
            if isinstance(b, Table)
        }
        if self._in_place:
            for placeholder, writes in in_place_writes(loop).items():
                self._reused.update(writes)
                (register,) = registers[placeholders.index(placeholder)]
                self._line(f"{register} = fxjacobi_copy({register})")
        t = self._name()
        self._line(f"for {t} in range({start}, {loop.trip_count}):")
        self._depth += 1
        arguments = self._arguments(loop, placeholders, operands, registers, tables, t, inner=inner)
        before = set(self._guards)
        outputs = self.graph(loop.body, arguments)
        for guard in self._guards.keys() - before:
            # One expectation a step, or the same at each; an inner loop's come once more at each step of this one.
            if guard not in self._of_step:
                self._guards[guard] *= loop.trip_count
            self._of_step.discard(guard)
        for output, name in stacked.items():
            self._line(f"{name}.append({self.tensor_of(outputs[output])})")
        for result, name in kept.items():
            assert isinstance(result, Step)
            self._line(f"if {t} == {result.step}:")
            self._line(f"    {name}.append({self.tensor_of(outputs[result.output])})")
        self._shift(loop, registers, outputs)
        self._depth -= 1
        self._wanted["aten::stack"] += len(stacked)
        whole = {output: self._bind(f"torch.ops.aten.stack({name}, {dim})") for output, name in stacked.items()}
        single = {result: self._bind(f"{name}[0]") for result, name in kept.items()}
        return [whole[r.output] if isinstance(r, Stacked) else single[r] for r in loop.results]

    def _arguments(
        self,
        loop: Loop,
        placeholders: list[fx.Node],
        operands: dict[int, str],
        registers: list[list[str]],
        tables: dict[Any, str],
        t: str,
        *,
        inner: bool,
    ) -> list[Any]:
        """Write what the body reads at step ``t``."""
        arguments: list[Any] = []
        for placeholder, binding, carried in zip(placeholders, loop.bindings, registers, strict=True):
            match binding:
                case Carried():
                    arguments.append(carried[0])
                case Scanned(operand, dim, indices, owned):
                    _require_tensor(placeholder)
                    index = self._indices(indices, t)
                    self._wanted["aten::select.int"] += 1
                    row = f"torch.ops.aten.select({operands[operand]}, {dim}, {index})"
                    if owned and inner:
                        self._wanted["aten::clone"] += 1
                        row = f"{row}.clone()"
                    arguments.append(self._bind(row))
                case Table():
                    _require_tensor(placeholder)
                    arguments.append(self._bind(f"{tables[binding]}[{t}]"))
                case Literal(values):
                    self._literals[placeholder] = values
                    literal = self._literal(values, t)
                    if isinstance(literal, str):
                        self._numbers.add(literal)
                    arguments.append(literal)
                case Invariant(operand):
                    _require_tensor(placeholder)
                    arguments.append(operands[operand])
        return arguments

    def _registers(self, binding: Any, operands: dict[int, str]) -> list[str]:
        """Variables for the values before an inner loop; none for what is not carried."""
        if not isinstance(binding, Carried):
            return []
        before = [operands[o] for o in binding.init]
        return [self._bind(before[min(i, len(before) - 1)]) for i in range(binding.distance)]

    def _shift(self, loop: Loop, registers: list[list[str]], outputs: list[Any]) -> None:
        every = {name for names in registers for name in names}
        new: list[tuple[str, str]] = []
        for binding, names in zip(loop.bindings, registers, strict=True):
            if isinstance(binding, Carried):
                # An output may itself be a register: all are read before any is overwritten.
                source = self.tensor_of(outputs[binding.output])
                new.append((names[-1], self._bind(source) if source in every else source))
        for names in registers:
            for older, newer in pairwise(names):
                self._line(f"{older} = {newer}")
        for name, source in new:
            self._line(f"{name} = {source}")

    def _indices(self, indices: Sequence[int], t: str) -> str:
        at = list(indices)
        step = at[1] - at[0] if len(at) > 1 else 1
        if at == [at[0] + i * step for i in range(len(at))]:
            return t if (at[0], step) == (0, 1) else f"{at[0]} + {step} * {t}"
        return f"{self._constant('List[int]', str(at))}[{t}]"

    def _literal(self, values: Sequence[Any], t: str) -> Any:
        kinds = {type(v) for v in values}
        if all(v == values[0] and type(v) is type(values[0]) for v in values):
            return Constant(values[0])
        if kinds == {int}:
            return self._indices(values, t)
        if kinds == {float}:
            return f"{self._constant('List[float]', text(list(values)))}[{t}]"
        if kinds == {bool}:
            return Bools()  # a guard may expect them; an operation would take them for integers
        raise NotScriptableError(f"a literal that is {' or '.join(sorted(k.__name__ for k in kinds))} by the step")
