"""What a captured program must not do: wait for the host, read a value back, draw random numbers, have dynamic shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Capturable", "NotCapturableError", "refusal"]

aten = torch.ops.aten

_LINALG = "it checks for errors on the host"
_NAMED: dict[str, str] = {
    "lift_fresh": "it makes a tensor from Python values",
    "lift_fresh_copy": "it makes a tensor from Python values",
    "is_nonzero": "it reads a value back to the host",
    "_linalg_check_errors": _LINALG,
    "linalg_eig": _LINALG,
    "_linalg_eigh": _LINALG,
    "linalg_lstsq": _LINALG,
    "_pin_memory": "it allocates host memory",
    "is_pinned": "it asks about host memory",
    "tensor_split": "its shapes depend on data",
    "histogram": "it runs on the host",
}
_INDEXED = {
    aten.index.Tensor: 1,
    aten.index_put.default: 1,
    aten.index_put_.default: 1,
    aten._index_put_impl_.default: 1,
}
_MASKS = (torch.bool, torch.uint8)


class NotCapturableError(Exception):
    """A program did what no captured program can do."""


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for item in values:
            yield from _tensors(item)
    elif isinstance(values, dict):
        for item in values.values():
            yield from _tensors(item)


def _draws(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for position, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "dropout"):
            given = args[position] if position < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(given != 0)
    return True


def refusal(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    """Return why the ATen operation ``func`` cannot be captured with these arguments, or ``None`` where it can."""
    name = func._schema.name.partition("::")[2]
    if _draws(func, args, kwargs):
        return f"{name} draws random numbers"
    if torch.Tag.data_dependent_output in func.tags:
        return f"{name} reads a value back to the host"
    if name in _NAMED:
        return f"{name}: {_NAMED[name]}"
    if func in _INDEXED:
        return _indexing(name, args)
    if torch.Tag.dynamic_output_shape in func.tags:
        return f"the shape of what {name} returns depends on data"
    return _between_devices(name, args, kwargs)


def _indexing(name: str, args: Sequence[Any]) -> str | None:
    indices = [index for index in args[1] if index is not None]
    if any(index.dtype in _MASKS for index in indices):
        return f"{name} by a mask depends on data in its shape"
    if any(index.device != args[0].device for index in indices):
        return f"{name} copies its index from another device"
    return None


def _between_devices(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
    devices = {tensor.device for tensor in _tensors((args, kwargs)) if tensor.dim() or tensor.device.type != "cpu"}
    target = kwargs.get("device")
    if target is not None and any(device != torch.device(target) for device in devices):
        return f"{name} copies to another device"
    if name in ("copy_", "copy", "_copy_from") and len({t.device for t in _tensors(args)}) > 1:
        return f"{name} copies between devices"
    if len(devices) > 1:
        return f"{name} reads from several devices"
    return None


class Capturable(TorchDispatchMode):
    """Inside, an operation that cannot be captured raises :class:`NotCapturableError` instead of running."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's mode carries no annotations

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        reason = refusal(func, args, kwargs or {})
        if reason is not None:
            raise NotCapturableError(reason)
        return func(*args, **(kwargs or {}))
