"""The recorded run as something that can be run again: its inputs, memory and random state as they were before it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.blocks import WarmStarting
from fxjacobi.capture import AttributeEffect, Capture, TensorEffect
from fxjacobi.placement import placed_copy
from fxjacobi.timing import started
from fxjacobi.trees import join, split
from fxjacobi.watch import MISSING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import fx

    from fxjacobi.generators import RandomState

__all__ = ["RecordedRun"]


@dataclass
class RecordedRun:
    """A recorded call and what it started from; running it again leaves no trace.

    Args:
        fn: What was called.
        args: Its arguments.
        kwargs: Its keyword arguments.
        capture: The record.
        before: The random state before it.
        tensors: The tensors among the arguments.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    capture: Capture
    before: RandomState
    tensors: list[torch.Tensor]

    def operands(self) -> list[torch.Tensor]:
        """The recorded run's inputs as they were before it."""
        saved = {e.position: e.saved for e in self.capture.effects if isinstance(e, TensorEffect)}
        inputs: list[torch.Tensor] = []
        for position, tensor in enumerate(self.tensors):
            earlier = saved.get(position)
            inputs.append(tensor if earlier is None else placed_copy(earlier))
        return inputs + [s.before for s in self.capture.states if s.before is not None]

    @contextlib.contextmanager
    def _memory_before(self) -> Iterator[None]:
        """Buffers and parameters hold, inside, what they held before the recorded run."""
        effects = [e for e in self.capture.effects if isinstance(e, TensorEffect) and e.target is not None]
        with torch.no_grad():
            now = [e.target.detach().clone() for e in effects if e.target is not None]
            try:
                for e in effects:
                    if e.target is not None and e.saved is not None:
                        e.target.detach().copy_(e.saved)
                yield
            finally:
                for e, value in zip(effects, now, strict=True):
                    if e.target is not None:
                        e.target.detach().copy_(value)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, memory, random state and grad mode are as before the recorded run."""
        self.before.restore()
        with self._memory_before(), torch.set_grad_enabled(self.capture.gradients):
            yield

    def emitted(self, module: fx.GraphModule) -> tuple[Sequence[torch.Tensor], float]:
        """Run an emitted module on the recorded run's inputs; return its values and the seconds it took."""
        operands = self.operands()
        for block in module.children():
            if isinstance(block, WarmStarting):
                block.forget()  # the same operands again would start from their own solution
        with self.again():
            clock = started()
            values = module(*operands)
            return values, clock()

    def original(self) -> float:
        """Time the original on the recorded run's inputs, leaving no trace."""
        operands = self.operands()
        attributes = [e for e in self.capture.effects if isinstance(e, AttributeEffect)]
        now = [e.container.get(e.key) for e in attributes]
        skeleton, _ = split((self.args, self.kwargs))
        args, kwargs = join(skeleton, operands[: len(self.tensors)])
        self.before.restore()
        with self._memory_before():
            for e in attributes:
                if e.before is MISSING:
                    del e.container[e.key]
                else:
                    e.container[e.key] = e.before
            try:
                clock = started()
                self.fn(*args, **kwargs)
                return clock()
            finally:
                for e, value in zip(attributes, now, strict=True):
                    e.container[e.key] = value
