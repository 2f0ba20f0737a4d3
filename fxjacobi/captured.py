"""What a recorded run is: the graph, and everything that ties it to the Python program."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import fx

    from fxjacobi.errors import CaptureError
    from fxjacobi.trees import Skeleton
    from fxjacobi.watch import Watch

__all__ = ["AttributeEffect", "Capture", "Recorded", "StateInput", "TensorEffect", "ViewOfWritten"]


@dataclass(frozen=True, slots=True)
class StateInput:
    """A tensor that the run read from ``container[key]`` and that runs replace: read anew at each call."""

    container: Any
    key: Any
    name: str
    before: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class TensorEffect:
    """The run wrote to memory that was there before: ``target`` (or input ``position``) becomes output ``value``.

    ``saved`` is what it held before.
    """

    target: torch.Tensor | None
    position: int | None
    value: int
    saved: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttributeEffect:
    """The run rebound ``container[key]``, which held ``before`` (or was missing), to a tensor: output ``value``."""

    container: Any
    key: Any
    value: int
    before: Any = None


@dataclass(frozen=True, slots=True)
class ViewOfWritten:
    """An output that is (a view of) memory which the run wrote to and which was there before.

    It is taken after the write: ``steps`` (operation, arguments) are replayed on the target itself.
    """

    target: torch.Tensor | None
    position: int | None
    steps: tuple[tuple[Any, tuple[Any, ...]], ...]


@dataclass(frozen=True)
class Capture:
    """One functional ATen-level graph and everything that ties it to the Python program.

    Attributes:
        graph_module: Placeholders: tensor arguments, then ``states``. Output: a flat tuple of ``count`` values.
        inputs: Skeleton of ``(args, kwargs)``.
        n_inputs: Number of tensor arguments.
        states: Tensors read from attributes that runs replace.
        outputs: Skeleton of the result; its tensor leaf ``i`` is ``sources[i]``.
        sources: For each tensor of the result: a position in the graph's output, or a view of written memory.
        effects: What the run left behind besides its result, in order.
        watch: The Python values the graph is valid for.
        results: The recorded run's values for the graph's output, as far as they still stand for it.
        ordinary_s: The run's wall time less the recorder's own, in seconds.
        elapsed_s: The run's wall time, in seconds.
        operations: Number of operations recorded.
        gradients: Whether something that the run returned or left behind requires gradients.
        draws: Whether the run drew random numbers.
        generators: The program's own generators that it drew from, each with its state before the run.
        undifferentiable: Why an emitted module would not have the run's gradients, if it would not.
    """

    graph_module: fx.GraphModule
    inputs: Skeleton
    n_inputs: int
    states: tuple[StateInput, ...]
    outputs: Skeleton
    sources: tuple[int | ViewOfWritten, ...]
    effects: tuple[TensorEffect | AttributeEffect, ...]
    watch: Watch
    results: tuple[torch.Tensor, ...]
    ordinary_s: float
    elapsed_s: float
    operations: int
    gradients: bool
    draws: bool
    generators: tuple[tuple[torch.Generator, torch.Tensor], ...]
    undifferentiable: str | None

    def forget(self) -> Capture:
        """This capture without the recorded run's tensors, once they have been compared with."""
        return replace(
            self,
            results=(),
            states=tuple(replace(s, before=None) for s in self.states),
            effects=tuple(
                replace(e, saved=None) if isinstance(e, TensorEffect) else replace(e, before=None) for e in self.effects
            ),
        )


@dataclass(frozen=True)
class Recorded:
    """What :func:`record` returns: the run's own result, its capture or the reason why there is none, and the watch."""

    result: Any
    capture: Capture | None
    failure: CaptureError | None
    watch: Watch
