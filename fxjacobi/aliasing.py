"""Which graph node a tensor's present value is, when tensors share memory and are written in place.

The recorder runs the user's program on real tensors, so identity of values is identity of memory: a value is a
*region* (one storage, with a version that counts writes) seen through a *geometry* (dtype, shape, strides, offset).
A write makes every other view of the region stale; a stale view is regenerated, when it is next read, by replaying
the view operations that made it on the region's new base. This is what functionalisation does with wrapper tensors;
doing it on the side leaves the user's run untouched, so a run that cannot be recorded still ends as it would.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from torch import fx

__all__ = ["Geometry", "Region", "View", "geometry_of", "storage_key"]

Geometry: TypeAlias = tuple[Any, ...]
"""``(dtype, shape, strides, offset)``, and a fifth entry ``True`` for a detached view (see :mod:`fxjacobi.memory`)."""

_untyped_storage = torch._C.TensorBase.untyped_storage


def storage_key(tensor: torch.Tensor) -> int:
    """Return the address of ``tensor``'s storage object (not of its bytes, which empty tensors share)."""
    key: int = _untyped_storage(tensor)._cdata
    return key


def geometry_of(tensor: torch.Tensor) -> Geometry:
    """Return how ``tensor`` looks at its storage."""
    return (
        tensor.dtype,
        tensor.shape,
        tensor.stride(),
        tensor.storage_offset(),
    )


@dataclass(slots=True)
class View:
    """One geometry of a region: its node, valid at ``version``, and the operation that derives it from ``parent``.

    ``requires_grad`` is set once a tensor that looks so was seen to require gradients.
    """

    node: fx.Node
    version: int
    parent: Geometry | None = None
    op: Any = None
    args: tuple[Any, ...] = ()
    requires_grad: bool = False


@dataclass(slots=True)
class Region:
    """One storage met during the run.

    ``birth`` is the position of the operation that made it (-1: none did); ``saved`` is what it held before the run's
    first write. ``origin`` is the placeholder or ``get_attr`` node of memory that was there before the run, else
    ``None``. ``plain`` says, once it was asked for, whether the base lies as a new tensor would. The weak reference
    keeps the storage's address from being reused while keeping none of its bytes.
    """

    reference: StorageWeakRef
    base: Geometry
    views: dict[Geometry, View] = field(default_factory=dict)
    version: int = 0
    birth: int = -1
    origin: fx.Node | None = None
    tensor: torch.Tensor | None = None
    saved: torch.Tensor | None = None
    plain: bool | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor, geometry: Geometry, node: fx.Node) -> Region:
        """A region whose base is ``tensor`` as it is now."""
        return cls(StorageWeakRef(_untyped_storage(tensor)), geometry, {geometry: View(node, 0)})
