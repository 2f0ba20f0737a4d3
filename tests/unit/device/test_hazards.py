"""What would stop a device for good is found before it runs there: indices made of guesses, random data out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxjacobi.device.hazards import indexes_by_guess, may_assert
from fxjacobi.device.rehearsal import on_cpu, rehearse, rehearse_call
from fxjacobi.loops import Carried, Invariant, Loop, Scanned, Stacked
from tests.unit.loop_makers import make_loop, trace

aten = torch.ops.aten


def converted(x: Any, table: Any) -> tuple[Any, ...]:
    return (aten.index_select.default(table, 0, aten._to_copy.default(x, dtype=torch.int64)),)


def clamped(x: Any, table: Any) -> tuple[Any, ...]:
    index = aten.clamp.default(aten._to_copy.default(x, dtype=torch.int64), 0, 3)
    return (aten.index_select.default(table, 0, index),)


def searched(x: Any, table: Any) -> tuple[Any, ...]:
    return (aten.gather.default(table, 0, aten.sub.Scalar(aten.searchsorted.Tensor(table, x), 1)),)


def largest(x: Any, table: Any) -> tuple[Any, ...]:
    return (aten.index_select.default(table, 0, aten.argmax.default(x, 0, True)),)


def in_float(x: Any, table: Any) -> tuple[Any, ...]:
    return (aten.mul.Tensor(table, aten.sum.default(x)),)


@pytest.mark.parametrize(
    ("body", "hazard"),
    [(converted, "index_select"), (searched, "gather"), (clamped, None), (largest, None), (in_float, None)],
)
def test_an_index_made_of_a_guess_is_found(body: Any, hazard: str | None) -> None:
    loop = make_loop(body, 1, [Carried(0, 1, (0,)), Invariant(1)], [], [torch.ones(1), torch.rand(4).sort()[0]])
    state = next(n for n in loop.body.graph.nodes if n.op == "placeholder")
    found = indexes_by_guess(loop.body, [state])
    assert (found is None) == (hazard is None)
    assert hazard is None or hazard in str(found)
    assert may_assert(loop.body) == (body is not in_float)
    assert indexes_by_guess(loop.body, []) is None


def test_a_token_that_a_step_wrote_is_a_lawful_index() -> None:
    def body(x: Any, table: Any) -> tuple[Any, ...]:
        return (aten.argmax.default(aten.embedding.default(table, x), -1),)

    loop = make_loop(
        body, 1, [Carried(0, 1, (0,)), Invariant(1)], [], [torch.zeros(3, dtype=torch.int64), torch.rand(5, 5)]
    )
    assert indexes_by_guess(loop.body, [next(iter(loop.body.graph.nodes))]) is None


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a device, for rehearsals without one."""

    device = torch.device("cuda")

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def looked_up() -> tuple[Loop, list[torch.Tensor]]:
    operands = [torch.zeros(6, 1), torch.rand(4)]
    loop = make_loop(converted, 6, [Scanned(0, 0, range(6)), Invariant(1)], [Stacked(0)], operands)
    return loop, operands


def test_random_data_that_would_stop_a_device_is_met_on_the_cpu_first() -> None:
    loop, operands = looked_up()
    wild = [torch.full((6, 1), 9.0), operands[1]]
    assert rehearse(loop, [operands, wild]) is None  # on the CPU an exception does no harm
    fine, bad = ([o.as_subclass(Elsewhere) for o in each] for each in (operands, wild))
    assert rehearse(loop, [fine]) is None
    reason = rehearse(loop, [fine, bad])
    assert reason is not None
    assert "would stop the device" in reason
    assert rehearse_call(loop.body, [bad[0][0], bad[1]]) is not None


def test_the_twin_names_no_device() -> None:
    body = trace(lambda x: (aten.add.Tensor(x, aten.full_like.default(x, 1.0, device=torch.device("meta"))),))
    assert on_cpu(body)(torch.ones(2))[0].tolist() == [2.0, 2.0]
