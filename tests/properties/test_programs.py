"""Whole generated programs: compiled output equals ordinary output, element by element, and plans are well formed."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import partial

import networkx as nx
import pytest
import torch
from hypothesis import event, given, note

import fxjacobi
from fxjacobi.plan import BlockPlan, Plan
from fxjacobi.testing import Program, assert_equivalent, programs


def check_plan(plan: Plan) -> None:
    """Raise ``AssertionError`` unless names are unique, each node is in one block and the order is topological."""
    names = [block.name for block in plan.blocks]
    assert len(set(names)) == len(names), f"two blocks of one name: {names}"
    nodes = [node for block in plan.blocks for node in block.nodes]
    assert len(set(nodes)) == len(nodes), f"a node in two blocks: {nodes}"
    place = {name: position for position, name in enumerate(names)}
    for producer, consumer in plan.edges:
        assert place[producer] < place[consumer], f"{producer} comes after {consumer}, which reads it"
    assert nx.is_directed_acyclic_graph(plan.to_networkx())
    assert all(block.equations >= 1 for block in plan.blocks)
    assert all(block.reason for block in plan.blocks), "a block without a reason"


# What fxjacobi may refuse to record; the original then runs, after one warning. Anything else must be captured.
REFUSALS = ("lazily conjugated", "was rebound to memory that was there before the run")


@given(programs())
def check_program(program: Program) -> None:
    model = program.build()
    # Unmeasured: where the emitted module is kept only if it is faster, few programs of this size would run it.
    compiled = fxjacobi.compile(model, measure=False)
    low_precision = torch.bfloat16 in {argument.dtype for argument in program.arguments}
    with torch.set_grad_enabled(program.grad), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # The recorded call, then fresh arguments twice.
        for seed in range(3):
            assert_equivalent(
                compiled,
                model,
                partial(program.make_args, seed),
                seed=seed,
                gradients=1e-3 if program.grad and not low_precision else None,
            )
            note(str(compiled.plan))
            check_plan(compiled.plan)
            OUTCOMES["solved" if compiled.report.solved else "original"] += 1
    OUTCOMES["programs"] += 1
    for warning in caught:
        if issubclass(warning.category, fxjacobi.ExactnessWarning):
            OUTCOMES["demoted"] += 1  # noticed, said and mended: the results above were equal
            note(str(warning.message))
            event("demoted")
            continue
        assert issubclass(warning.category, fxjacobi.CaptureWarning), warning.message
        assert any(known in str(warning.message) for known in REFUSALS), warning.message
    event("solved" if compiled.plan.solved else compiled.plan.reason.split(":")[0])


OUTCOMES: Counter[str] = Counter()


def test_compiled_programs_equal_the_ordinary_run() -> None:
    OUTCOMES.clear()
    check_program()
    assert OUTCOMES["solved"] > OUTCOMES["original"] / 3, f"too few calls ran an emitted module: {OUTCOMES}"
    # The check of the first result is the last net, under passes that know what each operation rounds by.
    assert OUTCOMES["demoted"] == 0, f"programs were demoted: {OUTCOMES}"


def block(name: str, *nodes: str) -> BlockPlan:
    return BlockPlan(name, None, "straight", 1, 1, "outside any loop", nodes=nodes)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan((block("a", "x"), block("b", "x")), (), True, "gains"), "a node in two blocks"),
        (Plan((block("a"), block("a")), (), True, "gains"), "two blocks of one name"),
        (Plan((block("a"), block("b")), (("b", "a"),), True, "gains"), "comes after"),
    ],
)
def test_a_planted_violation_of_the_plan_is_caught(plan: Plan, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_plan(plan)
