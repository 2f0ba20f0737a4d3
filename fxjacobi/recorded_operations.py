"""Operations that the recorder does not write down as they are, and what it does with them."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["CHECKS", "FILLED", "LIFTS", "REFUSED", "SPLITS"]

aten = torch.ops.aten

# Constructors whose value depends on no other value: one spelling, so that zeros_like(x) does not read x.
FILLED: dict[Any, tuple[int | None, Any]] = {
    aten.zeros.default: (None, 0),
    aten.ones.default: (None, 1),
    aten.full.default: (1, None),
    aten.zeros_like.default: (None, 0),
    aten.ones_like.default: (None, 1),
    aten.full_like.default: (1, None),
    aten.new_zeros.default: (None, 0),
    aten.new_ones.default: (None, 1),
    aten.new_full.default: (2, None),
    # What uninitialised memory holds is not part of a program's meaning; a graph must be deterministic.
    aten.empty.memory_format: (None, 0),
    aten.empty_like.default: (None, 0),
    aten.new_empty.default: (None, 0),
}
CHECKS: dict[Any, bool] = {
    aten._linalg_check_errors.default: False,  # any error code of the batch
    aten._assert_async.default: True,
    aten._assert_async.msg: True,
}
"""Operations that return nothing and raise where their argument is not as it should be, and what that is."""

SPLITS = (
    aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default, aten.unsafe_chunk.default, aten.chunk.default,
)  # fmt: skip
LIFTS = (aten.lift_fresh.default, aten.lift_fresh_copy.default)
REFUSED = {
    "set_": "a tensor's storage is replaced",
    "resize_": "a tensor is resized in place",
    "_conj": "a lazily conjugated tensor",
    "_neg_view": "a lazily negated tensor",
    "resize_as_": "a tensor is resized in place",
    "copy_from": "a copy between devices below the dispatcher",
}
