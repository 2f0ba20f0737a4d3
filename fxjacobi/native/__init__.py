"""A loop's steps in order as one function of machine code, written through LLVM: no calls, no allocations between operations.

    s_t = h_t(s_{t-d}),   t = 0 .. T-1

The body's graph is written as LLVM IR, pointwise operations fused, the loop-invariant matrices laid out for the processor's
vectors, and compiled for this processor. Sums come in another order than in PyTorch's kernels: equal up to rounding, not in bits.

================  ==============================================================
``emitter``       loops, folds and scratch memory in LLVM IR
``values``        tensors as functions from an index to an element
``functions``     exp, tanh and the like as straight arithmetic
``rules``         the table of operations that have a machine form
``pointwise``     .. elementwise operations
``views``         .. selections, transpositions, shapes, concatenations
``reductions``    .. sums, means and extrema along dimensions
``products``      .. matrix products
``graphs``        a graph, node by node
``disturbed``     how far rounding gets: a second trajectory beside the first
``steps``         a loop's body and bindings as one function
``program``       compiling and calling it
================  ==============================================================
"""

from __future__ import annotations

import importlib.util

__all__ = ["REMEDY", "available"]

REMEDY = "install fxjacobi[native] for machine code"


def available() -> bool:
    """Whether LLVM can be had: the package ``llvmlite``, of the extra ``native``."""
    return importlib.util.find_spec("llvmlite") is not None
