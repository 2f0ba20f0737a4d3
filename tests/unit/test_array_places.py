"""Elements that steps take of a tensor: read and written as by index, whether they form a lattice or not."""

from __future__ import annotations

import pytest
import torch

from fxjacobi.array_places import places

ROWS, COLUMNS = 4, 6
INDICES = torch.arange(ROWS * COLUMNS).view(ROWS, COLUMNS)

POSITIONS: dict[str, tuple[torch.Tensor, bool]] = {
    "columns": (INDICES.t(), True),
    "every other column": (INDICES[:, 1::2].t(), True),
    "one element": (INDICES.reshape(-1, 1), True),
    "one step": (INDICES[:, :1].t(), True),
    "several of a sample": (INDICES.view(ROWS, 3, 2).transpose(0, 1), True),
    "permuted": (INDICES[:, [3, 0, 5, 1, 2, 4]].t(), False),
    "backwards": (INDICES.flip(1).t(), False),
    "no step": (INDICES[:, :0].t(), False),
}


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("layout", ["dense", "in a column", "transposed"])
def test_the_same_as_by_index(name: str, layout: str) -> None:
    positions, lattice = POSITIONS[name]
    found = places(positions)
    assert (found.strides is not None) is lattice
    source = torch.randn(ROWS, COLUMNS)
    if layout == "in a column":  # flat with a stride
        source = torch.randn(ROWS, COLUMNS, 3)[..., 1]
    elif layout == "transposed":
        source = torch.randn(COLUMNS, ROWS).t()
    total = len(positions)
    for start, stop in {(0, total), (total // 2, total), (total // 2, total // 2)}:
        wanted = source.reshape(-1)[positions[start:stop]]
        read = found.read(source, start, stop)
        assert torch.equal(read, wanted)
        assert read.is_contiguous()
        assert read.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()
        held = torch.full(wanted.shape, 7.0)
        assert found.read(source, start, stop, out=held) is held
        assert torch.equal(held, wanted)
        written, by_index = torch.zeros(ROWS * COLUMNS), torch.zeros(ROWS * COLUMNS)
        found.write(written, start, wanted)
        by_index[positions[start:stop]] = wanted
        assert torch.equal(written, by_index)


def test_almost_a_lattice_is_none() -> None:
    positions = INDICES.t().clone()
    positions[3, 2] += 1
    assert places(positions).strides is None
