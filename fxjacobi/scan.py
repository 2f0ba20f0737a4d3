"""An explicit recurrence, with the signature of ``jax.lax.scan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from fxjacobi.recorder import current_recorder
from fxjacobi.scan_recording import ScanRecording

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["scan"]


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any,
    length: int | None = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """Run ``carry, y_t = step(carry, x_t)`` over the leading dimension of ``xs`` and stack the ``y_t``.

    By itself it is the ordinary loop, step by step. Inside a compiled model it is a loop that need not be found.

    Args:
        step: ``(carry, x) -> (carry, y)``, pytrees of tensors; the carry keeps its structure, shapes and dtypes. ``y``
            may hold ``None``.
        init: The carry before the first step.
        xs: A pytree of tensors ``(T, ...)``, sliced along dimension 0, or ``None``.
        length: ``T``; needed without ``xs``.
        reverse: Start at the last step; ``ys`` stays in the order of ``xs``.

    Returns:
        The last carry, and ``ys`` with leaves ``(T, ...)``.

    Raises:
        ValueError: Lengths disagree or are not given, there are no steps, or the carry changes.
        TypeError: A leaf of ``xs`` is no tensor, or ``step`` does not return a pair.
    """
    leaves, structure = pytree.tree_flatten(xs)
    tensors = [leaf for leaf in leaves if leaf is not None]
    steps = _length(tensors, length)
    carry = init
    before, carried = pytree.tree_flatten(init)
    outputs: list[list[Any]] = []
    shape_of_outputs: pytree.TreeSpec | None = None
    recorder = current_recorder()
    recording = None
    if recorder is not None and all(isinstance(leaf, torch.Tensor) for leaf in before):
        recording = ScanRecording(recorder, before, tensors, reverse=reverse)

    def one(t: int, slices: list[Any]) -> None:
        nonlocal carry, shape_of_outputs
        x = pytree.tree_unflatten(slices, structure)
        result: Any = step(carry, x)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError("step must return a pair (carry, y)")
        carry, y = result
        after, found = pytree.tree_flatten(carry)
        if found != carried:
            raise ValueError(f"step {t} changed the structure of the carry from {carried} to {found}")
        for old, new in zip(before, after, strict=True):
            _check_leaf(old, new, t)
        values, shape = pytree.tree_flatten(y)
        if shape_of_outputs is not None and shape != shape_of_outputs:
            raise ValueError(f"step {t} changed the structure of y from {shape_of_outputs} to {shape}")
        shape_of_outputs = shape
        outputs.append(values)

    def all_but_first() -> None:
        for t in order[1:]:
            one(t, cut(t))

    def cut(t: int) -> list[Any]:
        return [None if leaf is None else leaf[t] for leaf in leaves]

    order = range(steps - 1, -1, -1) if reverse else range(steps)
    first = cut(order[0])
    if recording is not None:
        recording.begin([x for x in first if x is not None])
    one(order[0], first)
    values = None
    if recording is not None:
        values = recording.recorded(pytree.tree_leaves(carry), [v for v in outputs[0] if v is not None])
    if recording is None or values is None or recorder is None:
        all_but_first()
        return carry, _stacked(outputs, shape_of_outputs, reverse)

    def rest() -> Any:
        nonlocal carry
        all_but_first()
        leaves_of_carry, shape = pytree.tree_flatten(carry)
        carry = pytree.tree_unflatten([leaf.clone() for leaf in leaves_of_carry], shape)
        return _stacked(outputs, shape_of_outputs, reverse)

    ys = recording.run_unrecorded(rest)
    stacked_leaves = [y for y in pytree.tree_leaves(ys) if y is not None]
    recording.finish(steps, values, pytree.tree_leaves(carry), stacked_leaves, recorder.root)
    return carry, ys


def _length(tensors: list[Any], length: int | None) -> int:
    for leaf in tensors:
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(f"xs holds {type(leaf).__name__}; its leaves must be tensors")
        if leaf.dim() == 0:
            raise ValueError("a leaf of xs has no dimension to scan along")
    lengths = {leaf.shape[0] for leaf in tensors} | ({length} if length is not None else set())
    if len(lengths) != 1:
        raise ValueError(f"scan needs one length; xs and length give {sorted(lengths) or 'none'}")
    (steps,) = lengths
    if steps < 1:
        raise ValueError("scan needs at least one step: without one, the shapes of ys are unknown")
    return int(steps)


def _stacked(outputs: list[list[Any]], shape: pytree.TreeSpec | None, reverse: bool) -> Any:
    assert shape is not None, "there is at least one step"
    if reverse:
        outputs.reverse()
    columns = [None if column[0] is None else torch.stack(column) for column in zip(*outputs, strict=True)]
    return pytree.tree_unflatten(columns, shape)


def _check_leaf(old: Any, new: Any, step: int) -> None:
    """Raise unless a leaf of the carry kept its kind."""
    if isinstance(old, torch.Tensor) != isinstance(new, torch.Tensor):
        raise ValueError(f"step {step} changed a leaf of the carry from {type(old).__name__} to {type(new).__name__}")
    if isinstance(old, torch.Tensor) and (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
        raise ValueError(
            f"step {step} changed a leaf of the carry from {tuple(old.shape)} {old.dtype} on {old.device} "
            f"to {tuple(new.shape)} {new.dtype} on {new.device}"
        )
