"""What a use may depend on: the lists of operations, held against what torch does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fxjacobi.ops import restride, write
from fxjacobi.passes.memory_effects import Alignment, Need, Needs, Phases
from fxjacobi.placement import phase_of
from tests.unit.passes.programs import build

if TYPE_CHECKING:
    from collections.abc import Callable

aten = torch.ops.aten
R = torch.randn

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128]


def need(fn: Callable[..., Any], *args: torch.Tensor) -> Need:
    return Needs().of(next(iter(build(fn, *args).graph.nodes)))


def gaps(x: torch.Tensor) -> torch.Tensor:
    return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


def turned(x: torch.Tensor) -> torch.Tensor:
    return x.t().clone(memory_format=torch.contiguous_format).t()


def on_two(op: Any) -> Callable[[Any, Any], Any]:
    """``op`` with a signature that can be traced."""

    def call(x: Any, y: Any) -> Any:
        return op(x, y)

    return call


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": on_two(aten.add.Tensor),
    "add with alpha": lambda x, y: aten.add.Tensor(x, y, alpha=0.3),
    "add a number with alpha": lambda x, _: aten.add.Scalar(x, 0.1, 0.7),
    "sub": on_two(aten.sub.Tensor),
    "mul": on_two(aten.mul.Tensor),
    "mul by a number": lambda x, _: aten.mul.Tensor(x, 0.3),
    "div": on_two(aten.div.Tensor),
    "abs": lambda x, _: aten.abs.default(x),
    "neg": lambda x, _: aten.neg.default(x),
    "where": lambda x, y: aten.where.self(aten.eq.Tensor(x, y), x, y),
    "clamp": lambda x, _: aten.clamp.default(x, -0.3, 0.7),
    "maximum": on_two(aten.maximum.default),
    "sigmoid": lambda x, _: aten.sigmoid.default(x),
}


DEFINED = [(n, d) for n in BINARY for d in DTYPES if not (d.is_complex and n in ("clamp", "maximum"))]


@pytest.mark.parametrize(("name", "dtype"), DEFINED)
def test_what_is_said_to_work_by_element_does_not_round_by_layout(name: str, dtype: torch.dtype) -> None:
    op = BINARY[name]
    x, y = R(3, 33, dtype=dtype), R(3, 33, dtype=dtype)
    if need(op, x, y) >= Need.LAYOUT:
        return
    for size in (1, 3, 7, 8, 16, 33):
        x, y = R(3, size, dtype=dtype), R(3, size, dtype=dtype)
        wanted = op(x, y)
        for layout in (gaps, turned):
            assert torch.equal(op(layout(x), layout(y)), wanted)
            assert torch.equal(op(layout(x), y), wanted)


def test_needs() -> None:
    x = R(4, 6)
    assert need(BINARY["neg"], x, x) is Need.ELEMENTS
    assert need(lambda x: aten.sigmoid.default(aten.neg.default(x)), x) is Need.ORDER
    assert need(lambda x: aten.sigmoid.default(aten.t.default(x)), x) is Need.LAYOUT
    assert need(lambda x: aten.mm.default(aten.t.default(x), x), x) is Need.ALIGNMENT
    assert need(lambda x: aten.add.Tensor(x, x, alpha=2), x) is Need.LAYOUT
    assert need(lambda x: aten.mul.Tensor(x, x), R(4, dtype=torch.complex64)) is Need.LAYOUT
    assert need(lambda x: aten.add.Tensor(x, x), R(4, dtype=torch.complex64)) is Need.ELEMENTS
    # An array that is written lies as before; what is written into it may lie in any way.
    assert need(lambda x, v: aten.mv.default(write(x, v, (1,)), v), x, R(6)) is Need.ALIGNMENT
    assert need(lambda v, x: aten.sigmoid.default(write(x, v, (1,))), R(6), x) is Need.ELEMENTS


def test_alignment() -> None:
    late = R(25)[1:].view(4, 6)

    def last(fn: Callable[..., Any], x: torch.Tensor) -> bool:
        return Alignment()(build(fn, x, R(6)).graph.find_nodes(op="output")[0].all_input_nodes[0])

    for fn, of_aligned, of_late in (
        (lambda x, v: write(write(x, v, (1,)), v, (2,)), True, False),
        (lambda x, v: aten.clone.default(write(x, v, (1,))), True, True),
        (on_two(aten.add.Tensor), True, True),
        (lambda x, _: restride(x, (1, 4)), True, True),
        (lambda x, _: aten.select.int(x, 0, 1), False, False),
    ):
        assert (last(fn, R(4, 6)), last(fn, late)) == (of_aligned, of_late)


def test_the_phase_of_what_a_run_is_given_and_of_parts_of_it() -> None:
    late = R(2 * 4 * 9 + 1)[1:].view(2, 4, 9)

    def parts(x: Any) -> Any:
        part = aten.slice.Tensor(aten.select.int(x, 0, 1), 0, 1, 3)
        row = aten.squeeze.dim(aten.unsqueeze.default(aten.select.int(part, 0, -1), 0), 0)
        written = aten.t.default(aten.select.int(write(x, row, (0, 1)), 0, 1))
        return x, part, row, written, aten.neg.default(part)

    module = build(parts, late)
    nodes, phases = module.graph.find_nodes(op="output")[0].args[0], Phases()
    values = module(late)
    assert [phases(n) for n in nodes] == [phase_of(v) for v in values]
    assert all(phase_of(v) != 0 for v in values[:4])
    assert phase_of(values[4]) == 0
