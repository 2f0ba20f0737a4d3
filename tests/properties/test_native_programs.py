"""Machine code of the recurrences of generated programs: at what it comes to, PyTorch's operations find every equation to hold."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import assume, event, given, note

import fxjacobi
from fxjacobi.methods import native
from fxjacobi.methods.comparison import compared
from fxjacobi.testing import Program, programs

if TYPE_CHECKING:
    import pytest

    from fxjacobi.methods.method import Contract
    from fxjacobi.system import States

OUTCOMES: Counter[str] = Counter()


APART: list[str] = []
"""What was found not to hold; an error raised from within a solve would be taken for one of the compiler's."""


def _looked_at(values: States, states: States, contract: Contract, **options: Any) -> Any:
    """Note whether ``h`` of a trajectory, as PyTorch evaluates it, is the trajectory, and go on."""
    OUTCOMES["solves"] += 1
    for value, state in zip(values, states, strict=True):
        if not value.is_floating_point():
            same = torch.equal(value, state)
        else:
            eps, tiny = torch.finfo(value.dtype).eps, torch.finfo(value.dtype).tiny
            scale = value.nan_to_num(0.0, 0.0, 0.0).abs().flatten(1).amax(1)
            gap = torch.where(value == state, 0.0, value - state).nan_to_num(0.0).abs().flatten(1).amax(1)
            same = torch.equal(value.isnan(), state.isnan()) and bool((gap <= 256 * eps * scale + tiny).all())
        if not same:
            APART.append(f"evaluated: {value}, run: {state}")
    return compared(values, states, contract, **options)


@given(programs())
def check_program(program: Program) -> None:
    assume({argument.dtype for argument in program.arguments} <= {torch.float32, torch.float64})
    compiled = fxjacobi.compile(program.build(), rtol=1e-3, method="native", measure=False)
    APART.clear()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(3):
            try:
                compiled(*program.make_args(seed))
            except Exception as error:  # noqa: BLE001 - the program's own
                event(type(error).__name__)
            note(str(compiled.plan))
            assert not APART, APART[0]
    OUTCOMES["programs"] += 1
    methods = {block.method for block in compiled.plan.blocks}
    OUTCOMES["native"] += "native" in methods


def test_machine_code_computes_what_the_steps_say(monkeypatch: pytest.MonkeyPatch) -> None:
    OUTCOMES.clear()
    monkeypatch.setattr(native, "compared", _looked_at)
    check_program()
    assert OUTCOMES["native"] > OUTCOMES["programs"] / 20, f"too few programs ran machine code: {OUTCOMES}"
    assert OUTCOMES["solves"] > 2 * OUTCOMES["native"]
