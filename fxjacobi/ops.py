"""The few operations that fxjacobi's graphs hold beside ATen's own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch._C._functorch import is_functorch_wrapped_tensor

from fxjacobi.errors import GuardFailed
from fxjacobi.placement import placed_copy, placed_empty
from fxjacobi.remembered import same_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Index", "draw", "draw_each", "guard", "guard_steps", "guard_tensor", "restride", "write"]

Index: TypeAlias = "tuple[int | tuple[int, int, int] | None, ...]"
"""One entry a leading dimension: an ``int`` selects, ``(start, stop, step)`` slices, ``None`` takes all."""


def basic_index(index: Index) -> tuple[int | slice, ...]:
    """Turn a graph-friendly :data:`Index` into what ``tensor[...]`` takes."""
    return tuple(slice(None) if i is None else slice(*i) if isinstance(i, tuple) else i for i in index)


def write(base: torch.Tensor, value: torch.Tensor, index: Index) -> torch.Tensor:
    """Return a copy of ``base`` in which ``base[index]`` is ``value`` (shape of the indexed part, dtype of base).

    The copy lies as ``base`` does (:mod:`fxjacobi.placement`), because some kernels round by that.
    """
    if index == () and not is_functorch_wrapped_tensor(base) and not is_functorch_wrapped_tensor(value):
        return placed_empty(base).copy_(value)
    result = placed_copy(base)
    result[basic_index(index)] = value
    return result


def draw(
    op: torch._ops.OpOverload,
    shape: list[int],
    stride: list[int],
    dtype: torch.dtype,
    device: torch.device,
    *args: float,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Return a new tensor of the given layout, filled by the in-place random ``op``.

    Generators fill in the order of memory, and choose their algorithm by contiguity: the layout is part of the draw.
    """
    result = torch.empty_strided(shape, stride, dtype=dtype, device=device)
    filled: torch.Tensor = op(result, *args, generator=generator)
    return filled


_BUILTIN: dict[Callable[..., Any], Callable[..., torch.Tensor]] = {
    torch.ops.aten.rand.default: torch.rand,
    torch.ops.aten.rand.generator: torch.rand,
    torch.ops.aten.randn.default: torch.randn,
    torch.ops.aten.randn.generator: torch.randn,
}
"""The same operations by a shorter way (measured: 1.6 us a call instead of 5)."""


def _uniform(count: int, shape: Sequence[int], **kwargs: Any) -> tuple[torch.Tensor, ...] | None:
    """Return ``count`` uniform draws from one call, or ``None`` where that might be other numbers.

    The CPU's generator gives uniform numbers one after another, whatever the shape (normal ones it does not). Each
    draw starts where an allocation of its own would, on a multiple of 64 bytes.
    """
    device = torch.device(kwargs.get("device") or torch.get_default_device())
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    size = math.prod(shape)
    if device.type != "cpu" or dtype not in (torch.float32, torch.float64) or size == 0:
        return None
    drawn = torch.rand(count, size, **kwargs)
    line = 64 // drawn.element_size()
    rows = drawn.new_empty(count, -(-size // line) * line)[:, :size].copy_(drawn)
    return rows.view(count, *shape).unbind()


def draw_each(
    op: torch._ops.OpOverload,
    count: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    filled: bool,
    inside: bool = False,
) -> tuple[torch.Tensor, ...]:
    """Return ``op(*args, **kwargs)``, or where ``filled`` :func:`draw` of these, for each of ``count`` draws in order.

    Those that stay ``inside`` of a graph may share the memory of one tensor.
    """
    if filled:
        return tuple([draw(op, *args, **kwargs) for _ in range(count)])
    one: Callable[..., torch.Tensor] = _BUILTIN.get(op, op)
    if inside and one is torch.rand:
        together = _uniform(count, *args, **kwargs)
        if together is not None:
            return together
    return tuple([one(*args, **kwargs) for _ in range(count)])


def guard(value: torch.Tensor | bool | int | float | complex, expected: bool | int | float | complex) -> None:
    """Raise :class:`GuardFailed` unless the one-element ``value`` is what Python saw in the recorded run."""
    found = value.item() if isinstance(value, torch.Tensor) else value
    if found != expected and not (found != found and expected != expected):
        raise GuardFailed(f"expected {expected}, found {found}")


def guard_list(value: torch.Tensor, expected: object) -> None:
    """Raise :class:`GuardFailed` unless ``value.tolist()`` is the (tuple of tuples) ``expected``."""
    if _frozen(value.tolist()) != expected:
        raise GuardFailed(f"expected {expected}, found {value.tolist()}")


def guard_shape(value: torch.Tensor | tuple[torch.Tensor, ...], expected: tuple[object, ...]) -> None:
    """Raise :class:`GuardFailed` unless a result whose shape depends on data has the recorded shape(s)."""
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else tuple(tuple(v.shape) for v in value)
    if shape != expected:
        raise GuardFailed(f"expected shape {expected}, found {shape}")


def _frozen(value: object) -> object:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def guard_tensor(value: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise :class:`GuardFailed` unless a constant of the model has the values that places were taken from."""
    same = (value.shape, value.dtype) == (expected.shape, expected.dtype)
    if not same or not same_bytes(value.detach().to(expected.device), expected):
        raise GuardFailed("a constant that says which elements are written was changed")


def guard_steps(values: torch.Tensor, expected: tuple[bool | int | float | complex, ...]) -> None:
    """:func:`guard` of every step at once: ``values`` ``(T, ...)`` of one element a step, against ``expected`` ``T``."""
    for found, wanted in zip(values.reshape(-1).tolist(), expected, strict=True):
        if found != wanted and not (found != found and wanted != wanted):
            raise GuardFailed(f"expected {wanted}, found {found}")


def restride(value: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """Return ``value``'s elements laid out with ``stride``, because some kernels round by layout.

    A dimension of stride 0 must be an expanded one; its first element stands for all.
    """
    part = value
    for dim, (size, step) in enumerate(zip(value.shape, stride, strict=True)):
        if step == 0 and size > 1:
            part = part.narrow(dim, 0, 1)
    result = torch.empty_strided(part.shape, stride, dtype=value.dtype, device=value.device)
    return result.copy_(part).expand(value.shape)


GUARDS = frozenset({guard, guard_list, guard_shape, guard_steps, guard_tensor})
"""The operations that are kept for their effect: a graph is valid only where all of them pass."""
