"""Machine code of a loop's steps: compiled once for each layout of its operands, and called."""

from __future__ import annotations

import ctypes
import functools
import threading
import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from llvmlite import binding as llvm

from fxjacobi.lanes import lanes_of, run_lanes
from fxjacobi.native.emitter import LINE
from fxjacobi.native.steps import Input, Text, inputs_of, written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fxjacobi.loops import Loop
    from fxjacobi.system import States, System

__all__ = ["Program", "Run", "prepared"]

_known: weakref.WeakKeyDictionary[Loop, dict[tuple[Input, ...], Program]] = weakref.WeakKeyDictionary()
_compiling = threading.Lock()

_MOST_LAYOUTS = 8
"""Programs of one loop that are kept."""


@dataclass(frozen=True, slots=True)
class Run:
    """What came out.

    Args:
        states: The trajectory, each component (T, ...).
        far: For each step and component, how far the disturbed lane was from it, ``max |s' - s|``, (T, components).
        large: Likewise ``max |s|``.
    """

    states: States
    far: torch.Tensor
    large: torch.Tensor


def prepared(system: System) -> tuple[Program, list[torch.Tensor]]:
    """Return the loop's steps as machine code, compiled at the first call for operands laid out like these, and what it reads.

    Raises:
        NoMachineFormError: The loop has no machine form.
    """
    inputs, tensors = inputs_of(system)
    with _compiling:
        programs = _known.setdefault(system.loop, {})
        if inputs not in programs:
            if len(programs) == _MOST_LAYOUTS:
                programs.clear()
            programs[inputs] = Program(written(system, inputs, _machine()[1]))
        return programs[inputs], tensors


class Program:
    """A compiled function.

    Attributes:
        agreed: Whether every equation was found to hold, to rounding, at what a call came to.
        calls: How often it ran.
        samples: How many samples a call may be split by.
    """

    def __init__(self, text: Text) -> None:
        machine, _ = _machine()
        module = llvm.parse_assembly(text.ir, context=llvm.create_context())
        module.verify()
        module.triple, module.data_layout = machine.triple, str(machine.target_data)
        tuning = llvm.create_pipeline_tuning_options(speed_level=3)
        tuning.loop_vectorization = tuning.slp_vectorization = True
        llvm.create_pass_builder(machine, tuning).getModulePassManager().run(
            module, llvm.create_pass_builder(machine, tuning)
        )
        self._engine = llvm.create_mcjit_compiler(module, _machine.__wrapped__()[0])  # an engine owns its machine
        self._engine.finalize_object()
        numbers = [ctypes.c_int64] * 3
        self._call = ctypes.CFUNCTYPE(None, *numbers, ctypes.c_void_p)(self._engine.get_function_address("run"))
        self._scratch = text.scratch
        self.samples = text.samples
        self.agreed = False
        self.calls = 0

    def __call__(self, system: System, tensors: Sequence[torch.Tensor], lanes: int = 1) -> Run:
        """Run all steps in order, on what :func:`prepared` returned; the samples in so many parts, side by side."""
        self.calls += 1
        states = tuple(torch.empty(s.shape, dtype=s.dtype) for s in system.base())
        parts = lanes_of(self.samples, lanes)
        tables = torch.empty(len(parts), 3, system.steps, len(states), dtype=torch.float64)

        def run(part: range, measures: torch.Tensor) -> None:
            scratch = torch.empty(self._scratch + LINE, dtype=torch.uint8)
            start = -(-scratch.data_ptr() // LINE) * LINE
            pointers = [start, *(t.data_ptr() for t in (*tensors, *states, *measures))]
            table = (ctypes.c_void_p * len(pointers))(*pointers)
            self._call(system.steps, part.start, part.stop, ctypes.addressof(table))

        run_lanes([partial(run, part, measures) for part, measures in zip(parts, tables, strict=True)])
        far, large, _ = tables.amax(0).unbind(0) if len(parts) > 1 else tables[0].unbind(0)
        return Run(states, far, large)


@functools.cache
def _machine() -> tuple[Any, int]:
    """Return LLVM's description of this processor, and how many float32 one of its vector registers holds."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=llvm.get_host_cpu_name(), features=features.flatten(), opt=3, jit=True)
    lanes = 16 if features.get("avx512f") else 8 if features.get("avx2") else 4
    return machine, lanes
