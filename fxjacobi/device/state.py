"""The carried state of a loop in static buffers: what a captured step reads, and where it leaves what it made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.aliasing import storage_key
from fxjacobi.bits import bits_of
from fxjacobi.device.operands import layout_of, static_like
from fxjacobi.device.runner import Refused
from fxjacobi.loops import Carried, read_at

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from fxjacobi.device.operands import StaticOperands
    from fxjacobi.loops import Loop

__all__ = ["CarriedState", "bits_of"]

_LEAD = 3
"""Steps after which a state has the layout that it keeps; one that still changes is refused."""


def _repeats(value: torch.Tensor) -> bool:
    return any(step == 0 and size > 1 for size, step in zip(value.shape, value.stride(), strict=True))


@dataclass(frozen=True, slots=True)
class _Queue:
    """One carried placeholder: what it reads now and at the next ``distance - 1`` steps, oldest first."""

    placeholder: int
    output: int
    init: tuple[int, ...]
    slots: tuple[int, ...]  # into the buffers


class CarriedState:
    """One queue of static buffers for each carried placeholder, as long as its distance.

    The first steps may read values that are laid out otherwise than what the body makes (an initial state given by the
    user); they run uncaptured until the layout repeats, since kernels round by layout.

    Attributes:
        buffers: All buffers, queue after queue.
        lead: How many steps run uncaptured at the start.
    """

    def __init__(
        self, loop: Loop, operands: StaticOperands, queues: Sequence[_Queue], buffers: list[torch.Tensor], lead: int
    ) -> None:
        self.loop = loop
        self.operands = operands
        self.buffers = buffers
        self.lead = lead
        self._queues = queues
        self._keys = {storage_key(buffer) for buffer in buffers}

    @classmethod
    def of(cls, loop: Loop, operands: StaticOperands) -> CarriedState | Refused:
        """Find out how the state is laid out, by running the first steps on the operands loaded."""
        carried = [(i, b) for i, b in enumerate(loop.bindings) if isinstance(b, Carried)]
        if any(len(b.init) < b.distance for _, b in carried):
            return Refused("it has fewer steps than its state reaches back")
        queues, count = [], 0
        for placeholder, binding in carried:
            slots = tuple(range(count, count + binding.distance))
            count += binding.distance
            queues.append(_Queue(placeholder, binding.output, binding.init, slots))
        values = [operands.values[operand] for queue in queues for operand in queue.init]
        trial = cls(loop, operands, queues, values, 0)
        for lead in range(min(_LEAD, loop.trip_count) + 1):
            before = [layout_of(value) for value in values]
            outputs = loop.body.forward(*trial.arguments(values=values, step=min(lead, loop.trip_count - 1)))
            new = trial.after(outputs, values)
            # Of the layouts only the newest of each queue is new; once it is that of all, it stays.
            if [layout_of(value) for value in new] == before:
                if lead >= loop.trip_count:
                    return Refused("it has too few steps")
                buffers = [static_like(value) for value in values if not _repeats(value)]
                found = [buffer for buffer in buffers if buffer is not None]
                if len(found) < len(values):
                    return Refused("elements of its state share memory")
                return cls(loop, operands, queues, found, lead)
            values = new
        return Refused("the layout of its state changes from step to step")

    def start(self, wanted: list[tuple[Any, ...]] | None = None) -> int:
        """Put the initial values in place, run the steps that lead in, and return how many these are.

        Args:
            wanted: Where the outputs of those steps go.
        """
        values = [self.operands.values[operand] for queue in self._queues for operand in queue.init]
        for step in range(self.lead):
            outputs = self.loop.body.forward(*self.arguments(values=values, step=step))
            values = self.after(outputs, values)
            if wanted is not None:
                wanted.append(tuple(outputs))
        if self.buffers:
            torch._foreach_copy_(self.buffers, list(values))
        return self.lead

    def arguments(
        self, *, values: Sequence[torch.Tensor] | None = None, step: int = 0, skip: Container[int] = ()
    ) -> list[Any]:
        """Return the body's arguments at ``step``, the carried ones from ``values`` (the buffers by default).

        Placeholders in ``skip`` are left ``None``.
        """
        values = self.buffers if values is None else values
        operands = self.operands.values
        heads = {queue.placeholder: values[queue.slots[0]] for queue in self._queues}
        arguments: list[Any] = []
        for place, binding in enumerate(self.loop.bindings):
            if place in skip:
                arguments.append(None)
            else:
                arguments.append(heads[place] if place in heads else read_at(binding, step, operands, ()))
        return arguments

    def after(self, outputs: Sequence[Any], values: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Return the state after a step that returned ``outputs``, as tensors that may be buffers one further on."""
        values = self.buffers if values is None else values
        new: list[torch.Tensor] = []
        for queue in self._queues:
            new += [values[slot] for slot in queue.slots[1:]]
            new.append(outputs[queue.output])
        return new

    def materialised(self, outputs: Sequence[Any]) -> list[Any]:
        """Return ``outputs`` with copies of those that lie in the buffers, which are about to be written."""
        return [o.clone() if isinstance(o, torch.Tensor) and storage_key(o) in self._keys else o for o in outputs]

    def unchanged(self, new: Sequence[torch.Tensor], old: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return on the device whether two states have the same bits, as one bool."""
        same = [(bits_of(a) == bits_of(b)).all() for a, b in zip(new, old, strict=True)]
        return same[0] if len(same) == 1 else torch.stack(same).all()

    def write(self, new: Sequence[torch.Tensor]) -> None:
        """Leave ``new`` in the buffers, where values may lie in buffers themselves.

        A queue moves up oldest first, so what is still to be read is not overwritten; anything else that lies in a buffer
        is copied before.
        """
        apart = [
            value.clone() if storage_key(value) in self._keys and all(value is not b for b in self.buffers[place:]) else value
            for place, value in enumerate(new)
        ]  # fmt: skip
        for buffer, value in zip(self.buffers, apart, strict=True):
            if buffer is not value:
                buffer.copy_(value)
