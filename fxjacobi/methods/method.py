"""What a method is: an immutable recipe ``init / step / done`` that one driver loop runs (:mod:`fxjacobi.solve`)."""

from __future__ import annotations

import dataclasses
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from fxjacobi.footprint import StateSize
    from fxjacobi.loops import Loop
    from fxjacobi.methods.comparison import Comparison
    from fxjacobi.methods.linearised import Seen
    from fxjacobi.methods.settle import PassedOn
    from fxjacobi.system import States, System

__all__ = ["Contract", "Evaluated", "Iterate", "Method"]


@dataclass(frozen=True, slots=True)
class Contract:
    """What a solve must deliver.

    Args:
        rtol: Relative tolerance. An update of step ``t`` is within tolerance when
            ``max |update| <= atol + rtol * max |s_t|`` for each tensor of the state (largest magnitude of that tensor
            at that step: single elements near zero do not set the scale).
        atol: Absolute tolerance. With ``rtol=0`` and ``atol=0`` the contract is exact: bits.
        exactly_batched: Whether the caller knows that evaluating many steps at once keeps the bits of each.
        max_sweeps: Bound on the sweeps; ``None`` means ``T``.
        patience: Sweeps without progress (the update not halved, the prefix hardly grown) after which the solve gives
            up and completes in order; ``None`` never gives up before the bound.
        trial_until: For a trial, the value of ``time.perf_counter()`` after which no sweep starts; a trial also ends
            where steps would have to be completed in order (:class:`fxjacobi.solve.TrialError`).

    Raises:
        ValueError: A tolerance is negative or not finite, or a bound is negative.
    """

    rtol: float = 0.0
    atol: float = 0.0
    exactly_batched: bool = False
    max_sweeps: int | None = None
    patience: int | None = 16
    trial_until: float | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{name} must be finite and at least 0, not {value}")
        if self.max_sweeps is not None and self.max_sweeps < 0:
            raise ValueError(f"max_sweeps must be at least 0, not {self.max_sweeps}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1, not {self.patience}")

    @property
    def exact(self) -> bool:
        """Whether the answer must be the sequential one bit for bit."""
        return self.rtol == 0 and self.atol == 0


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The equations as a sweep evaluated them at the very states that it left.

    Args:
        at: The steps that were looked at, ascending; ``None``: all.
        values: ``h`` of the states at these.
        others: The body's outputs that are results and no state, by output index, (T, ...).
        against: How far the states are from ``values``, at these steps.
        near: Which steps are near enough to the answer as far as the method knows otherwise, (T,).
    """

    at: tuple[int, ...] | None
    values: States
    others: dict[int, torch.Tensor]
    against: Comparison
    near: torch.Tensor


@dataclass(frozen=True, slots=True)
class Iterate:
    """Where a solve stands.

    Args:
        states: The trajectory after the last sweep.
        prefix: Number of leading steps that are final: bit for bit in the exact contract; within tolerance, errors
            still to come included, in the other.
        update: Largest update of the last sweep in units of the tolerance (``inf`` before the first; in the exact
            contract, the share of steps that changed).
        updates: The same for each step (T,), where the method keeps it.
        gains: For each step, by how much it last passed an update of the steps before on; ``inf`` where unknown.
        stop: Where the steps that are being iterated end; updates of different ranges are not compared.
        carried: What is left of errors within the tolerance at the last final steps (:class:`fxjacobi.methods.settle.Errors`).
        memory: What the method itself carries from sweep to sweep.
        seen: What sweeps of a method that linearises have shown of the equations (:class:`fxjacobi.methods.linearised.Seen`).
        others: The outputs of the body that are results and no state, by output index, ``(T, ...)``, where the sweep
            yielded them.
        open: The steps whose equations the last sweep may have evaluated at other values than ``states`` now holds; at
            all others ``s_t = h_t(s_{t-d})`` holds as evaluated. ``None``: any may be.
        evaluated: The equations at ``states``, where the sweep looked at them.
    """

    states: States
    prefix: int = 0
    update: float = math.inf
    updates: torch.Tensor | None = None
    gains: torch.Tensor | None = None
    stop: int | None = None
    carried: PassedOn = ()
    memory: Any = None
    seen: Seen | None = None
    others: dict[int, torch.Tensor] | None = None
    open: tuple[int, ...] | None = None
    evaluated: Evaluated | None = None


class Method(ABC):
    """A way to solve ``s_t = h_t(s_{t-d})`` for all ``t``. Subclasses are final, frozen, and their fields are options."""

    keeps_bits: ClassVar[bool]
    """Whether its fixed point is the sequential answer bit for bit when batched evaluation keeps bits."""

    @property
    def name(self) -> str:
        """The method with its size and the options that differ from their defaults, as a plan prints it."""
        options: list[str] = []
        every: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self)  # type: ignore[arg-type]
        for field in every:
            value = getattr(self, field.name)
            if field.name in ("chunk", "window"):
                options.append(str(value))
            elif value != field.default:
                options.append(f"{field.name}={value}")
        word = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        return f"{word}({', '.join(options)})" if options else word

    @property
    def cores(self) -> int:
        """How many of the processor's cores it runs parts of its own on (:mod:`fxjacobi.lanes`)."""
        return 1

    @abstractmethod
    def applies(self, loop: Loop) -> bool:
        """Whether the method can solve this loop at all (the driver runs it in order where not)."""

    @abstractmethod
    def init(self, system: System, guess: States, contract: Contract) -> Iterate:
        """Return the iterate before the first sweep."""

    @abstractmethod
    def step(self, system: System, iterate: Iterate, contract: Contract) -> Iterate:
        """Return the iterate after one more sweep."""

    @abstractmethod
    def done(self, iterate: Iterate, contract: Contract) -> bool:
        """Whether the iterate meets the contract, as far as the method can tell (the driver checks the residual)."""

    def of_samples(self, system: System, iterate: Iterate, samples: torch.Tensor) -> Iterate | None:  # noqa: ARG002 - for subclasses
        """Return the iterate of some samples of the batch alone, or ``None`` where it cannot go on with these.

        The caller takes the samples out of ``states``; a method takes them out of its ``memory``.
        """
        return None

    def moved(self, before: Iterate, after: Iterate) -> tuple[States, States] | None:
        """Return a pair of trajectories whose difference tells which samples the last sweep left unsettled."""
        return after.states, before.states

    def moves_on(self, iterate: Iterate) -> bool:  # noqa: ARG002 - for subclasses
        """Whether the next sweep takes up steps that no sweep has seen, of all samples."""
        return False

    def rows_at_once(self, steps: int, reach: int) -> int:  # noqa: ARG002 - for subclasses
        """Return how many of ``steps`` steps one batched evaluation of a sweep takes, where memory allows it."""
        return steps

    def bytes_per_step(self, loop: Loop, size: StateSize) -> int:  # noqa: ARG002 - for subclasses
        """Return the bytes that a sweep holds for each step, beside two trajectories and evaluations in ranges.

        Derivatives take an evaluation's memory once more.
        """
        return 0
