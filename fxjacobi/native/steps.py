"""A loop's body and bindings as one LLVM function: the steps in order, each component of the state written as it comes.

    void steps(i64 count, i64 first, i64 last, ptr scratch, ptr of each input ..., ptr of each component ..., ptr far, ptr large, ptr mean)

Two trajectories are run side by side, which share what is read of the matrices: the answer, and one whose every read of the state is
disturbed by some epsilons (:mod:`fxjacobi.native.disturbed`). Where no sample of a batch reads another's values, a call runs
samples ``first .. last - 1`` alone, so that each core may run some.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from llvmlite import ir
from torch import fx

from fxjacobi.constants import constant
from fxjacobi.loops import Carried, Invariant, Literal
from fxjacobi.lowered import lowered
from fxjacobi.native.disturbed import Disturbed, measured
from fxjacobi.native.emitter import (
    INDEX,
    NUMBERS,
    POINTER,
    Emitter,
    NoMachineFormError,
    NotSplitError,
    Samples,
    element_of,
)
from fxjacobi.native.graphs import GraphWriter
from fxjacobi.native.values import Value, at_strides, dense_strides, place_of, remembered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.system import System

__all__ = ["Input", "Text", "inputs_of", "written"]

_log = logging.getLogger(__name__)

_MOST_NODES = 2000
_MOST_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class Input:
    """What a placeholder reads that is there before the loop, or that the loop carries.

    Args:
        shape: Of one step's value.
        strides: Likewise; of what is carried they are row-major.
        dtype: Of its elements.
        step: Elements from one step's value to the next; zero where it is the same at all.
        carry: The component of the state and the distance, where it is carried; ``step`` is then the state's.
        number: The number that it is at every step, and no tensor.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    step: int = 0
    carry: tuple[int, int] | None = None
    number: float | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """LLVM IR, the bytes of scratch memory that it wants, and the samples that it may be split by (one: none)."""

    ir: str
    scratch: int
    samples: int


Inputs: TypeAlias = tuple[Input, ...]


def inputs_of(system: System) -> tuple[Inputs, list[torch.Tensor]]:
    """Return what the loop's placeholders read, and the tensors of those that are no numbers, in order.

    A carry's tensor is what it reads before there is a step to read, (distance, ...).

    Raises:
        NoMachineFormError: A placeholder reads what has no machine form.
    """
    inputs: list[Input] = []
    tensors: list[torch.Tensor] = []
    carries = {c.placeholder: c for c in system.carries}
    fixed = system.fixed(slice(0, system.steps))
    for index, (binding, value) in enumerate(zip(system.loop.bindings, fixed, strict=True)):
        if isinstance(binding, Carried):
            carry = carries[index]
            before = carry.before.contiguous()
            shape = tuple(before.shape[1:])
            inputs.append(
                Input(shape, dense_strides(shape), before.dtype, before[0].numel(), (carry.component, carry.distance))
            )
            tensors.append(before)
        elif isinstance(binding, Literal):
            if not all(isinstance(v, (int, float)) for v in value):
                raise NoMachineFormError("a step reads a Python value that is no number")
            if all(v == value[0] and type(v) is type(value[0]) for v in value) and str(value[0]) != "-0.0":
                inputs.append(Input((), (), torch.float64, number=value[0]))
            else:
                inputs.append(Input((), (), torch.float64, 1))
                tensors.append(constant(value, dtype=torch.float64, device=torch.device("cpu")))
        elif not isinstance(value, torch.Tensor):
            raise NoMachineFormError("a step reads a Python value that is no tensor")
        else:
            value = value.resolve_neg()
            whole = isinstance(binding, Invariant)
            shape, strides = tuple(value.shape), tuple(value.stride())
            if not whole:
                inputs.append(Input(shape[1:], strides[1:], value.dtype, strides[0]))
            else:
                inputs.append(Input(shape, strides, value.dtype))
            tensors.append(value)
    return tuple(inputs), tensors


def written(system: System, inputs: Inputs, width: int) -> Text:
    """Return the loop's steps as LLVM IR.

    Args:
        system: The loop with operands, of which shapes alone matter.
        inputs: What its placeholders read.
        width: Elements of float32 in a vector register.

    Raises:
        NoMachineFormError: The body does what has no machine form.
    """
    body = _body(system)
    if len(body.graph.nodes) > _MOST_NODES:
        raise NoMachineFormError(f"a step of {len(body.graph.nodes)} operations")
    for given in inputs:
        if given.number is None and given.dtype not in NUMBERS:
            raise NoMachineFormError(f"elements of {given.dtype}")
        if 0 in given.shape:
            raise NoMachineFormError("a tensor without elements")
    sizes = {i.shape[:1] for i in inputs if i.carry is not None}
    size = sizes.pop()[0] if len(sizes) == 1 and () not in sizes else 1
    if size > 1:
        try:
            return _function(system, body, inputs, width, size)
        except NotSplitError as why:
            _log.debug("a step of %d samples is not split: %s", size, why)
    return _function(system, body, inputs, width, 1)


def _function(system: System, body: fx.GraphModule, inputs: Inputs, width: int, size: int) -> Text:
    module = ir.Module("loop")
    passed = [i for i in inputs if i.number is None]
    kinds = [*[INDEX] * 3, *[POINTER] * (4 + len(passed) + len(system.components))]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), "steps")
    function.attributes.add("noinline")  # a function's own arguments are known not to overlap
    for argument in function.args[3:]:
        argument.add_attribute("noalias")
    count, first, last, scratch, *pointers = function.args
    states, tables = pointers[len(passed) : -3], pointers[-3:]
    emitter = Emitter(function, scratch, width, Samples(size, first, last) if size > 1 else None)
    with emitter.steps(count) as t:
        _step(emitter, system, body, inputs, _Pointers(pointers[: len(passed)], states, tables), t)
    emitter.builder.ret_void()
    if emitter.bytes > _MOST_BYTES:
        raise NoMachineFormError(f"a step of {emitter.bytes / 2**20:.0f} MiB")
    _entry(module, function)
    return Text(str(module), emitter.bytes, size)


@dataclass(frozen=True, slots=True)
class _Pointers:
    inputs: Sequence[Any]
    states: Sequence[Any]
    tables: Sequence[Any]


def _step(emitter: Emitter, system: System, body: fx.GraphModule, inputs: Inputs, pointers: _Pointers, t: Any) -> None:
    """Write step ``t`` of both trajectories."""
    components = len(system.components)
    reach = [max(c.distance for c in system.carries if c.component == i) for i in range(components)]
    of_component = {i.carry[0]: i for i in inputs if i.carry is not None}
    disturbed = [Disturbed(emitter, of_component[i].shape, of_component[i].dtype, reach[i]) for i in range(components)]
    rest = iter(pointers.inputs)
    runs: tuple[list[Any], list[Any]] = ([], [])
    for given in inputs:
        if given.number is not None:
            values: tuple[Any, Any] = (given.number, given.number)
        elif given.carry is None:
            values = (_read(emitter, given, next(rest), t),) * 2
        else:
            values = _carried(emitter, given, next(rest), pointers, disturbed[given.carry[0]], t)
        for run, value in zip(runs, values, strict=True):
            run.append(value)
    outputs = GraphWriter(emitter).graph(body, runs)
    found = [tuple(remembered(emitter, _tensor(run[output])) for run in outputs) for output in system.components]
    row = emitter.builder.mul(t, emitter.index(components))
    for component, (value, other) in enumerate(found):
        _put(emitter, value, pointers.states[component], t)
        disturbed[component].keep(other, t)
        place = emitter.builder.add(row, emitter.index(component))
        for number, table in zip(measured(emitter, value, other), pointers.tables, strict=True):
            emitter.store(number, table, place, torch.float64)


def _entry(module: Any, steps: Any) -> None:
    """``void run(i64 count, i64 first, i64 last, ptr table)``: the pointers out of a table."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [*[INDEX] * 3, POINTER]), "run")
    builder = ir.IRBuilder(function.append_basic_block())
    *numbers, table = function.args
    pointers = [
        builder.load(builder.gep(table, [ir.Constant(INDEX, i)], source_etype=POINTER), typ=POINTER)
        for i in range(len(steps.args) - len(numbers))
    ]
    builder.call(steps, [*numbers, *pointers])
    builder.ret_void()


def _body(system: System) -> fx.GraphModule:
    """Return the loop's body as one graph of operations."""
    body = system.loop.body
    if all(node.op != "call_module" for node in body.graph.nodes):
        return body
    if any(system.body.varying):
        raise NoMachineFormError("a graph inside a step, beside a number that is another at each")
    return lowered(body.forward, *system.loop.bind(system.operands, 0, []))


def _read(emitter: Emitter, given: Input, pointer: Any, t: Any) -> Value:
    """Return what a placeholder reads at step ``t`` that is there before the loop."""
    if given.step == 0:
        return at_strides(emitter, pointer, given.shape, given.strides, given.dtype, steady=True)
    source = emitter.offset(pointer, emitter.builder.mul(t, emitter.index(given.step)), element_of(given.dtype))
    return at_strides(emitter, source, given.shape, given.strides, given.dtype)


def _carried(
    emitter: Emitter, given: Input, before: Any, pointers: _Pointers, disturbed: Disturbed, t: Any
) -> tuple[Value, Value]:
    """Return what a carry reads at step ``t`` in both trajectories; before the first step, both read the same."""
    assert given.carry is not None
    component, distance = given.carry
    builder = emitter.builder
    early = builder.icmp_signed("<", t, emitter.index(distance))
    earlier = builder.sub(t, emitter.index(distance))
    row = emitter.select(early, t, earlier)
    at, kind = builder.mul(row, emitter.index(given.step)), element_of(given.dtype)
    source = emitter.offset(emitter.select(early, before, pointers.states[component]), at, kind)
    # Into memory of its own: what follows then writes nothing that it may be.
    found = at_strides(emitter, source, given.shape, given.strides, given.dtype)
    value = remembered(emitter, Value(found.shape, found.dtype, found.at, True, False))
    place = builder.add(builder.mul(row, emitter.index(len(pointers.states))), emitter.index(component))
    # Of a step before the first one: what is written there later.
    mean = emitter.select(
        early, emitter.number(0.0, torch.float64), emitter.load(pointers.tables[-1], place, torch.float64)
    )
    other = emitter.select(early, source, disturbed.row(row))
    return value, disturbed.read(other, mean, t)


def _tensor(value: Any) -> Value:
    if not isinstance(value, Value):
        raise NoMachineFormError("a state that is no tensor")
    return value


def _put(emitter: Emitter, value: Value, pointer: Any, t: Any) -> None:
    """Write a component of the state at step ``t``."""
    size = torch.Size(value.shape).numel()
    target = emitter.offset(pointer, emitter.builder.mul(t, emitter.index(size)), element_of(value.dtype))
    with emitter.over(value.shape) as index:
        emitter.store(value.at(index), target, place_of(emitter, index, value.shape), value.dtype)
