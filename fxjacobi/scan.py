"""An explicit recurrence, with the signature of ``jax.lax.scan``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from fxjacobi.bits import equal_elements
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
    tensors = _present(leaves)
    steps = _length(tensors, length)
    carry = init
    before, carried = pytree.tree_flatten(init)
    outputs: list[list[Any]] = []
    shape_of_outputs: pytree.TreeSpec | None = None
    recorder = current_recorder()

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
    first, given = cut(order[0]), before
    recording = None
    apart = None if recorder is None else ScanRecording.apart(recorder, [*before, *first])
    if recorder is not None and apart is not None:
        before, slices = apart[: len(before)], apart[len(before) :]
        carry = pytree.tree_unflatten(before, carried)
        recording = ScanRecording(recorder, _present(before), tensors, reverse=reverse)
        recording.begin(_present(slices))
        given, first = [*given, *first], slices
    one(order[0], first)
    if recording is not None and apart is not None:
        written = _written_back(recording, given, apart)
        carry = pytree.tree_map(lambda v: written.get(id(v), v), carry)
        outputs[0] = [written.get(id(v), v) for v in outputs[0]]
    values = None
    if recording is not None:
        values = recording.recorded(_present(pytree.tree_leaves(carry)), _present(outputs[0]))
    if recording is None or values is None or recorder is None:
        all_but_first()
        return carry, _stacked(outputs, shape_of_outputs, reverse)

    def rest() -> Any:
        nonlocal carry
        all_but_first()
        leaves_of_carry, shape = pytree.tree_flatten(carry)
        carry = pytree.tree_unflatten([None if leaf is None else leaf.clone() for leaf in leaves_of_carry], shape)
        return _stacked(outputs, shape_of_outputs, reverse)

    ys = recording.run_unrecorded(rest)
    stacked_leaves = _present(pytree.tree_leaves(ys))
    recording.finish(steps, values, _present(pytree.tree_leaves(carry)), stacked_leaves, recorder.root)
    return carry, ys


def _present(leaves: list[Any]) -> list[Any]:
    """Return the leaves that are not ``None``: these the loop carries, reads and yields."""
    return [leaf for leaf in leaves if leaf is not None]


def _written_back(
    recording: ScanRecording, given: list[torch.Tensor | None], copies: list[torch.Tensor | None]
) -> dict[int, torch.Tensor]:
    """Write to the step's arguments what it wrote to their copies in place; return these by the copies' ids."""
    pairs = [(a, b) for a, b in zip(given, copies, strict=True) if a is not None and b is not None]
    changed = recording.run_unrecorded(lambda: [not bool(equal_elements(a, b).all()) for a, b in pairs])
    return {id(copied): leaf.copy_(copied) for (leaf, copied), differs in zip(pairs, changed, strict=True) if differs}


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
