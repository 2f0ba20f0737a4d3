"""What the rules write LLVM IR with: loops, folds, and scratch memory."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from llvmlite import ir

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "BYTE",
    "INDEX",
    "LINE",
    "NUMBERS",
    "POINTER",
    "Emitter",
    "NoMachineFormError",
    "NotSplitError",
    "Samples",
    "element_of",
]

INDEX = ir.IntType(64)
BYTE = ir.IntType(8)
POINTER = ir.PointerType()
BIT = ir.IntType(1)

NUMBERS: dict[torch.dtype, Any] = {torch.float32: ir.FloatType(), torch.float64: ir.DoubleType(), torch.bool: BIT}
"""The dtypes that have a machine form, and the type of an element in a register."""

LINE = 64
"""Bytes of a cache line, and of the widest vectors: every buffer starts at a multiple."""


def element_of(dtype: torch.dtype) -> Any:
    """Return the type of an element in memory."""
    return BYTE if dtype is torch.bool else NUMBERS[dtype]


class NoMachineFormError(Exception):
    """A loop does not become machine code; the message says why."""


class NotSplitError(NoMachineFormError):
    """A sample reads what another one computes: the steps cannot be run for some samples alone."""


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples, of ``size`` in dimension 0, that a call of the function runs: ``first .. last - 1``."""

    size: int
    first: Any
    last: Any


class Emitter:
    """Writes into one function.

    Args:
        function: An LLVM function without code.
        scratch: Its argument that points to scratch memory.
        width: Elements of float32 that one vector register holds.
        samples: Those that a call runs, where it runs some; tensors in memory whose dimension 0 is of their size then hold
            these alone.

    Attributes:
        builder: Where the next instruction goes.
    """

    def __init__(self, function: Any, scratch: Any, width: int, samples: Samples | None = None) -> None:
        self.module = function.module
        self.builder = ir.IRBuilder(function.append_basic_block("before"))
        self.width = width
        self.samples = samples
        self._own: list[Any] = []
        self._scratch = scratch
        self._bytes = 0
        self._outside: Any = None

    @property
    def bytes(self) -> int:
        """Size of the scratch memory so far."""
        return self._bytes

    def index(self, value: int) -> Any:
        """Return an index that is known now."""
        return ir.Constant(INDEX, value)

    def number(self, value: float, dtype: torch.dtype) -> Any:
        """Return an element that is known now."""
        return ir.Constant(NUMBERS[dtype], bool(value) if dtype is torch.bool else float(value))

    def scratch(self, elements: int, dtype: torch.dtype) -> Any:
        """Return a pointer to memory of its own for ``elements`` values."""
        pointer = self.offset(self._scratch, self.index(self._bytes), BYTE, anywhere=True)
        self._bytes += -(-elements * dtype.itemsize // LINE) * LINE
        return pointer

    def offset(self, pointer: Any, by: Any, kind: Any, *, anywhere: bool = False) -> Any:
        """Return ``pointer + by`` elements of an LLVM type; ``anywhere``: one that holds before the loop over steps, too."""
        builder = self._outside if anywhere and self._outside is not None else self.builder
        return builder.gep(pointer, [by], inbounds=True, source_etype=kind)

    def load(self, pointer: Any, at: Any, dtype: torch.dtype) -> Any:
        """Return element ``at`` of a buffer."""
        if dtype is torch.bool:
            byte = self.builder.load(self.offset(pointer, at, BYTE), typ=BYTE)
            return self.builder.icmp_unsigned("!=", byte, ir.Constant(BYTE, 0))
        kind = NUMBERS[dtype]
        return self.builder.load(self.offset(pointer, at, kind), typ=kind, align=dtype.itemsize)

    def store(self, value: Any, pointer: Any, at: Any, dtype: torch.dtype) -> None:
        """Write element ``at`` of a buffer."""
        if dtype is torch.bool:
            self.builder.store(self.builder.zext(value, BYTE), self.offset(pointer, at, BYTE))
        else:
            self.builder.store(value, self.offset(pointer, at, NUMBERS[dtype]), align=dtype.itemsize)

    # -- loops ----------------------------------------------------------------------------------------------------

    def splits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape in memory holds some samples alone."""
        return self.samples is not None and bool(shape) and shape[0] == self.samples.size

    def check_own(self, row: Any) -> None:
        """Refuse to read another sample's part of a tensor that holds some samples alone."""
        if not any(row is own for own in self._own):
            raise NotSplitError("a sample reads what another one computes")

    @contextmanager
    def own(self, rows: Sequence[Any]) -> Iterator[None]:
        """Inside, these places in dimension 0 are samples of the call's own."""
        self._own.extend(rows)
        yield
        del self._own[len(self._own) - len(rows) :]

    @contextmanager
    def whole(self, *, but: bool) -> Iterator[None]:
        """Inside, :meth:`over` goes through all samples; not so where ``but``."""
        samples = self.samples
        self.samples = samples if but else None
        yield
        self.samples = samples

    @contextmanager
    def loop(self, count: Any) -> Iterator[Any]:
        """Repeat what is written inside for ``i = 0 .. count - 1``; ``count`` is at least 1."""
        with self.fold(count, ()) as (i, _, _):
            yield i

    @contextmanager
    def fold(self, count: Any, initial: Sequence[Any]) -> Iterator[tuple[Any, list[Any], list[Any]]]:
        """As :meth:`loop`, with values that go from one iteration to the next.

        Yields the index, the values as the iteration before left them, and a list: what is put into it is what this one
        leaves, and holds, after the loop, what the last one left.
        """
        builder = self.builder
        count = self.index(count) if isinstance(count, int) else count
        before, head = builder.block, builder.append_basic_block("loop")
        builder.branch(head)
        builder.position_at_end(head)
        i = builder.phi(INDEX)
        i.add_incoming(self.index(0), before)
        carried = [builder.phi(value.type) for value in initial]
        for phi, value in zip(carried, initial, strict=True):
            phi.add_incoming(value, before)
        left: list[Any] = []
        yield i, carried, left
        following = builder.add(i, self.index(1), flags=("nuw", "nsw"))
        i.add_incoming(following, builder.block)
        for phi, value in zip(carried, left, strict=True):
            phi.add_incoming(value, builder.block)
        after = builder.append_basic_block("after")
        builder.cbranch(builder.icmp_signed("<", following, count), head, after)
        builder.position_at_end(after)

    @contextmanager
    def where(self, condition: Any) -> Iterator[None]:
        """Do what is written inside where a condition holds."""
        with self.builder.if_then(condition):
            yield

    @contextmanager
    def over(self, shape: Sequence[int]) -> Iterator[list[Any]]:
        """Go through all indices of a shape, the last dimension innermost."""
        if self.samples is None or not self.splits(shape):
            with self._over([], shape) as index:
                yield index
            return
        first = self.samples.first
        with self.loop(self.builder.sub(self.samples.last, first)) as i:
            row = self.builder.add(i, first, flags=("nsw",))
            with self.own([row]), self._over([row], shape[1:]) as index:
                yield index

    @contextmanager
    def _over(self, index: list[Any], shape: Sequence[int]) -> Iterator[list[Any]]:
        if not shape:
            yield index
        elif shape[0] == 1:
            with self._over([*index, self.index(0)], shape[1:]) as whole:
                yield whole
        else:
            with self.loop(shape[0]) as i, self._over([*index, i], shape[1:]) as whole:
                yield whole

    @contextmanager
    def steps(self, count: Any) -> Iterator[Any]:
        """The loop over the steps; :meth:`once` writes before it."""
        function = self.builder.function
        self._outside = self.builder
        self.builder = ir.IRBuilder(function.append_basic_block("step"))
        head = self.builder.block
        t = self.builder.phi(INDEX)
        yield t
        following = self.builder.add(t, self.index(1), flags=("nuw", "nsw"))
        t.add_incoming(following, self.builder.block)
        t.add_incoming(self.index(0), self._outside.block)
        self._outside.branch(head)
        after = function.append_basic_block("done")
        self.builder.cbranch(self.builder.icmp_signed("<", following, count), head, after)
        self.builder.position_at_end(after)

    @contextmanager
    def once(self) -> Iterator[None]:
        """Write what is inside before the loop over the steps."""
        inside = self.builder
        self.builder = self._outside
        try:
            yield
        finally:
            self.builder = inside

    # -- arithmetic -----------------------------------------------------------------------------------------------

    def intrinsic(self, name: str, *arguments: Any) -> Any:
        """Call an LLVM intrinsic of the first argument's type (``"llvm.sqrt"``), scalar or vector."""
        kind = arguments[0].type
        suffix = (
            f"v{kind.count}{kind.element.intrinsic_name}" if isinstance(kind, ir.VectorType) else kind.intrinsic_name
        )
        return self._call(f"{name}.{suffix}", arguments)

    def library(self, name: str, *arguments: Any) -> Any:
        """Call a function of the C library, of the name that it has for float64 (``"erf"``)."""
        single = isinstance(arguments[0].type, ir.FloatType)
        return self._call(f"{name}f" if single else name, arguments)

    def _call(self, name: str, arguments: Sequence[Any]) -> Any:
        function = self.module.globals.get(name)
        if function is None:
            kind = arguments[0].type
            function = ir.Function(self.module, ir.FunctionType(kind, [a.type for a in arguments]), name)
        return self.builder.call(function, list(arguments))

    def select(self, condition: Any, yes: Any, no: Any) -> Any:
        """Return ``yes`` where the condition holds and ``no`` elsewhere."""
        return self.builder.select(condition, yes, no)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """Return ``a b + c``, rounded once where the processor can."""
        return self.intrinsic("llvm.fmuladd", a, b, c)

    def converted(self, value: Any, source: torch.dtype, target: torch.dtype) -> Any:
        """Return an element in another dtype."""
        if source is target:
            return value
        kind = NUMBERS[target]
        if source is torch.bool:
            return self.builder.uitofp(value, kind)
        if target is torch.bool:
            return self.builder.fcmp_unordered("!=", value, ir.Constant(value.type, 0.0))
        return (self.builder.fpext if target is torch.float64 else self.builder.fptrunc)(value, kind)
