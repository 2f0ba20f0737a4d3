"""What the out-of-place form of an in-place operation returns: another dtype and layout than the memory written to."""

from __future__ import annotations

from typing import Any

import torch

from fxjacobi.graph import TensorSpec
from fxjacobi.memory import own_memory_spec

__all__ = ["dtype_out_of_place", "spec_out_of_place"]

_FORMS: dict[tuple[Any, ...], tuple[torch.dtype, tuple[int, ...]] | None] = {}
"""What the meta device said; ``None`` where an operation has no meta form."""


def dtype_out_of_place(functional: Any, args: tuple[Any, ...], target: torch.Tensor) -> torch.dtype:
    """The dtype that ``functional(*args)`` has, where the in-place form casts back to ``target``'s."""
    kinds = [(a.dtype, a.dim() == 0) if isinstance(a, torch.Tensor) else type(a) for a in args]
    if all(not isinstance(k, tuple) or k[0] == target.dtype for k in kinds) and target.dtype.is_floating_point:
        return target.dtype
    if torch.Tag.nondeterministic_seeded in functional.tags:
        return target.dtype
    form = _form((functional, target.dtype, *kinds), functional, args)
    return target.dtype if form is None else form[0]  # what has no meta form (boolean indices) does not promote


def spec_out_of_place(functional: Any, args: tuple[Any, ...], target: torch.Tensor) -> TensorSpec:
    """The spec of ``functional(*args)``, but for the dtype, which is ``target``'s.

    An elementwise operation keeps the order of its first argument's strides; a matrix product returns a contiguous
    tensor whatever it was written to.
    """
    spec = own_memory_spec(target)
    if target.is_contiguous() or torch.Tag.pointwise in functional.tags:
        return spec
    layouts = [(a.dtype, a.shape, a.stride()) if isinstance(a, torch.Tensor) else type(a) for a in args]
    form = _form((functional, *layouts), functional, args)
    return spec if form is None else TensorSpec(spec.shape, spec.dtype, spec.device, form[1])


def _form(key: tuple[Any, ...], functional: Any, args: tuple[Any, ...]) -> tuple[torch.dtype, tuple[int, ...]] | None:
    if key not in _FORMS:
        try:
            found = functional(*(_on_meta(a) for a in args))
        except RuntimeError:  # index_put and its like with boolean indices
            _FORMS[key] = None
        else:
            _FORMS[key] = found.dtype, tuple(found.stride())
    return _FORMS[key]


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, list) and any(isinstance(item, torch.Tensor) for item in value):
        return [None if item is None else item.to("meta") for item in value]
    return value
