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

import functools
import importlib.util

__all__ = ["missing"]

REMEDY = "install fxjacobi[native] for machine code"


@functools.cache
def missing() -> str | None:
    """Return why there is no LLVM, and the remedy; ``None`` where the package ``llvmlite``, of the extra ``native``, is there."""
    if importlib.util.find_spec("llvmlite") is None:
        return REMEDY
    try:
        from fxjacobi.native import program  # noqa: F401 - whether it can be loaded, and is new enough
    except Exception as error:  # noqa: BLE001 - somebody else's installation, broken in whatever way
        return f"{REMEDY}: the llvmlite that is there does not load ({type(error).__name__}: {error})"
    return None
