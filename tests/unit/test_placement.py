from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from fxjacobi.ops import write
from fxjacobi.placement import alignment, phase_of, placed_copy, placed_empty, rounding_phase

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxjacobi.ops import Index

CPU = torch.device("cpu")
R = torch.randn

LAID_OUT = {
    "dense": lambda: R(3, 4, 5),
    "late": lambda: R(61)[1:].view(3, 4, 5),
    "numpy, late": lambda: torch.from_numpy(np.zeros(61, dtype=np.float32)[1:]).view(3, 4, 5),
    "turned": lambda: R(3, 5, 4).transpose(1, 2),
    "turned and late": lambda: R(3, 6, 4)[:, 1:].transpose(1, 2),
    "every second": lambda: R(3, 4, 10)[..., ::2],
    "a column": lambda: R(3, 4, 5, 7)[..., 3],
}


@pytest.mark.parametrize("make", LAID_OUT.values(), ids=LAID_OUT)
def test_a_copy_lies_as_its_source_does(make: Callable[[], torch.Tensor]) -> None:
    source = make()
    found = placed_copy(source)
    assert torch.equal(found, source)
    assert found.data_ptr() != source.data_ptr()
    assert (found.stride(), phase_of(found)) == (source.stride(), phase_of(source))


@pytest.mark.parametrize("index", [(), (1,), (None, (0, 4, 2)), (0, 1, 2)])
@pytest.mark.parametrize("make", LAID_OUT.values(), ids=LAID_OUT)
def test_so_does_an_array_that_is_written(make: Callable[[], torch.Tensor], index: Index) -> None:
    base = make()
    before = base.clone()
    wanted = base.clone()
    part = wanted[tuple(slice(*i) if isinstance(i, tuple) else slice(None) if i is None else i for i in index)]
    value = R(part.shape)
    part.copy_(value)
    found = write(base, value, index)
    assert torch.equal(found, wanted)
    assert torch.equal(base, before)
    assert (found.stride(), phase_of(found)) == (base.stride(), phase_of(base))


def test_repeated_elements_get_memory_of_their_own() -> None:
    base = R(1, 4).expand(3, 4)
    found = write(base, torch.zeros(4), (1,))
    assert torch.equal(found, torch.stack([base[0], torch.zeros(4), base[2]]))
    assert placed_copy(R(0, 3)).shape == (0, 3)


def test_a_phase_can_be_asked_for() -> None:
    for phase in (0, 4, 60):
        assert phase_of(placed_empty(torch.empty(5, 6), phase)) == phase


def test_new_tensors_are_aligned_and_what_kernels_round_by_is_part_of_the_phase() -> None:
    for size in (1, 3, 100, 1000):
        assert phase_of(torch.empty(size)) == 0
    assert alignment(CPU) % 16 == 0
    assert [rounding_phase(R(8)[k:]) for k in range(5)] == [0, 4, 8, 12, 0]


def test_under_a_transform_a_write_is_an_ordinary_one() -> None:
    bases, values = R(5, 3, 4), R(5, 4)
    found = torch.vmap(lambda base, value: write(base, value, (1,)))(bases, values)
    assert torch.equal(found, torch.stack([write(b, v, (1,)) for b, v in zip(bases, values, strict=True)]))
    assert torch.equal(torch.vmap(lambda base, value: write(base, value, ()))(bases, bases + 1), bases + 1)


def test_products_round_by_the_phase_and_by_nothing_coarser() -> None:
    # What rounding_phase says; if a build of torch rounds by more, this fails and _ROUNDING_BYTES must grow.
    weight, row = R(33, 9), R(2, 9)
    results = []
    for start in range(16):
        memory = torch.zeros(18 + 16)
        results.append(memory[start : start + 18].copy_(row.view(-1)).view(2, 9) @ weight.t())
    for start in range(4, 16):
        assert torch.equal(results[start], results[start % 4])
