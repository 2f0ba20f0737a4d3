"""What graphs say of their values is so: shape, dtype, strides where they matter, and where aligned memory starts.

A pass that forwards, copies or batches a value goes by its spec; one that is not true costs bits, but only on some
machines and sizes, so it is looked for here directly.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import event, given, note, settings
from torch import fx

from fxjacobi.capture import record
from fxjacobi.graph import Spec, TensorSpec, make_module, spec_of_value
from fxjacobi.layouts import lie_alike
from fxjacobi.passes.canonicalize import Canonicalize
from fxjacobi.passes.eliminate import Eliminate
from fxjacobi.passes.hoist_random import HoistRandom
from fxjacobi.passes.memory_effects import Alignment, Phases
from fxjacobi.passes.prefixes_to_writes import PrefixesToWrites
from fxjacobi.placement import phase_of
from fxjacobi.testing import Program, programs

if TYPE_CHECKING:
    from fxjacobi.passes.base import Pass


def lies_as(value: Any, spec: Spec) -> bool:
    if isinstance(spec, TensorSpec):
        found = spec_of_value(value)
        return (
            isinstance(found, TensorSpec)
            and (found.shape, found.dtype) == (spec.shape, spec.dtype)
            and lie_alike(found, spec)
        )
    return spec is None or all(lies_as(v, s) for v, s in zip(value, spec, strict=True))


class Check(fx.Interpreter):
    """Runs a graph and compares each value with what the graph says of it."""

    def __init__(self, module: fx.GraphModule, *, whole: bool = True) -> None:
        super().__init__(module)
        self.aligned, self.phases, self.whole = Alignment(), Phases(), whole

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "output":
            return value
        assert lies_as(value, n.meta["spec"]), f"{n.format_node()}: {n.meta['spec']!r}, found {spec_of_value(value)!r}"
        if isinstance(value, torch.Tensor) and value.numel():
            assert not self.aligned(n) or phase_of(value) == 0, f"{n.format_node()} starts at no aligned address"
            if self.whole and n.op in ("placeholder", "get_attr"):
                assert self.phases(n) == phase_of(value), n.format_node()
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        called = self.fetch_attr(target)
        assert isinstance(called, fx.GraphModule)  # a submodule that was recorded once
        return Check(called, whole=False).run(*args, **kwargs)


@settings(max_examples=150)
@given(programs())
def test_values_lie_as_the_graph_says(program: Program) -> None:
    with torch.set_grad_enabled(program.grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = torch.get_rng_state()
        try:
            recorded = record(program.build(), program.make_args(), {})
        except IndexError:  # the program's own: a loop that ended early left it fewer steps than it then reads
            event("the program raises")
            return
        if recorded.capture is None:
            event("not captured")
            return
        capture = recorded.capture
        module = capture.graph_module
        stages: list[Pass] = [Canonicalize(gradients=capture.gradients), HoistRandom(), Eliminate(), PrefixesToWrites()]
        for stage in (None, *stages):
            module = stage.run(module).module if stage is not None else module
            note(str(module.graph))
            torch.set_rng_state(state)  # the recorded draws, for the recorded branches
            before = [s.before for s in capture.states if s.before is not None]
            Check(module).run(*program.make_args(), *before)


@pytest.mark.parametrize("of", ["strides", "alignment"])
def test_a_planted_falsehood_is_seen(of: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["spec"] = TensorSpec((2, 3), torch.float32, torch.device("cpu"), (1, 2) if of == "strides" else (3, 1))
    x.meta["phase"] = 0
    graph.output((x,))
    late = torch.zeros(7)[1:].view(2, 3)
    with pytest.raises(AssertionError, match="found" if of == "strides" else "no aligned address"):
        Check(make_module({}, graph)).run(torch.zeros(2, 3) if of == "strides" else late)
