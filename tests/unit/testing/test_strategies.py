"""``programs()`` makes runnable programs, and between them they hold every feature that it promises."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, find, given, settings

from fxjacobi.testing import Argument, Layout, Program, assert_equal_bits, assert_equivalent, programs

FEATURES = (
    "expression", "two back", "RNNCell", "GRUCell", "LSTMCell", "submodule", "linear", "map", "per-step parameters",
    "per-step literal", "fixed point", "period 2", "list of iterates", "sum over iterates", "until it settles",
    "writes", "autoregressive", "nested loops", "layers inside", "layers outside", "straight",
    "gather by stack", "gather by cat", "gather by write", "branch on data", "early break", "number from data", "random",
    "0 steps", "1 steps", "2 steps", "many steps", "0 repetitions", "many repetitions", "batch 0", "batch 1", "batch many",
    "float64", "float32", "bfloat16", "int64", "int32", "bool", "complex64", "complex128", "contiguous", "transposed",
    "strided", "offset", "special values", "argument written in place", "module state", "counter", "attribute",
    "running mean", "batch norm", "returns: dict", "returns: none", "returns: nested", "returns: same twice",
    "returns: view", "returns: view of argument", "grad", "module", "function",
    "access: index", "access: select", "access: unbind", "access: enumerate", "access: batch first", "access: reversed",
    "access: slice", "access: shifted", "access: table",
)  # fmt: skip


@given(programs())
def test_a_program_runs_and_is_a_function_of_its_arguments_and_seed(program: Program) -> None:
    ast.parse(repr(program))
    model = program.build()
    with torch.set_grad_enabled(program.grad):
        for seed in range(2):
            assert_equivalent(model, model, partial(program.make_args, seed))


@settings(
    max_examples=1500,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    deadline=None,
)
@given(programs())
def collect(program: Program) -> None:
    SEEN.update(program.features)


SEEN: Counter[str] = Counter()


def test_every_feature_occurs() -> None:
    SEEN.clear()
    collect()
    missing = [feature for feature in FEATURES if not SEEN[feature]]
    assert not missing


def holds(feature: str, program: Program) -> bool:
    return feature in program.features


def test_features_name_what_the_source_holds() -> None:
    quick = settings(max_examples=3000, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    for feature, text in (("LSTMCell", "nn.LSTMCell"), ("early break", "break"), ("branch on data", "if ")):
        program: Program = find(programs(), partial(holds, feature), settings=quick)
        assert text in program.source
        program()


def test_programs_of_a_seed_have_the_same_parameters() -> None:
    source = (
        "import torch\nfrom torch import nn\n\nclass Program(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.linear = nn.Linear(2, 2)\n\n    def forward(self, x):\n"
        "        return self.linear(x)\n"
    )
    program = Program(source, (Argument("x", (3, 2), torch.float32),), frozenset(), seed=4)
    model: Any = program.build()
    before = torch.get_rng_state()
    assert_equal_bits(program(), program())
    assert torch.equal(before, torch.get_rng_state()), "building a program draws from a generator of its own"
    assert "return self.linear(x)" in inspect.getsource(model.forward)


def test_a_source_without_a_program_is_refused() -> None:
    with pytest.raises(ValueError, match="class Program"):
        Program("x = 1", (), frozenset()).build()


@pytest.mark.parametrize("layout", Layout)
def test_layouts_hold_equal_values_at_other_places(layout: Layout) -> None:
    plain = Argument("x", (2, 3, 4), torch.float32).make(torch.Generator().manual_seed(1))
    placed = Argument("x", (2, 3, 4), torch.float32, layout).make(torch.Generator().manual_seed(1))
    assert torch.equal(plain, placed)
    place = (placed.stride(), placed.storage_offset())
    assert (place == (plain.stride(), 0)) == (layout is Layout.CONTIGUOUS)


def test_special_values_are_set() -> None:
    argument = Argument("x", (2, 2), torch.float32, Layout.STRIDED, specials=((5, float("nan")), (0, -0.0)))
    value = argument.make(torch.Generator())
    assert torch.isnan(value[0, 1])
    assert torch.signbit(value[0, 0])
    assert "element 5 is nan" in str(argument)
