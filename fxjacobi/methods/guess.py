"""Initial guesses: they never change the answer, only how many sweeps lead to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxjacobi.system import States, System

__all__ = ["Base", "Extrapolated", "Given", "Guess", "Previous"]


class Guess(ABC):
    """Where a solve starts. Subclasses are final."""

    @abstractmethod
    def states(self, system: System) -> States:
        """Return a trajectory of ``system``'s shapes."""


@dataclass(frozen=True)
class Base(Guess):
    """Every step as before the loop: ``s_t = s_{-1}``."""

    @override
    def states(self, system: System) -> States:
        return system.base()


@dataclass(frozen=True)
class Previous(Guess):
    """The trajectory of an earlier solve (streams, training steps); the base values where its shapes do not fit."""

    trajectory: States

    @override
    def states(self, system: System) -> States:
        base = system.base()
        if len(base) != len(self.trajectory):
            return base
        pairs = list(zip(self.trajectory, base, strict=True))
        fits = all((p.shape, p.dtype, p.device) == (b.shape, b.dtype, b.device) for p, b in pairs)
        return self.trajectory if fits else base


@dataclass(frozen=True)
class Extrapolated(Guess):
    """A line along ``t`` through the values before the loop and after ``run`` steps: ``s_t = s_{-1} + (t + 1) slope``.

    For chains that move smoothly, as samplers do. Integers keep their base values.

    Raises:
        ValueError: ``run`` is not positive.
    """

    run: int = 1

    def __post_init__(self) -> None:
        if self.run < 1:
            raise ValueError(f"a line needs at least 1 step, not {self.run}")

    @override
    def states(self, system: System) -> States:
        base = system.base()
        run = min(self.run, system.steps)
        states = base
        for step in range(run):
            after = system.next_states(states, step, step + 1)
            pieces = zip(states, after, strict=True)
            states = tuple(torch.cat([s[:step], a, s[step + 1 :]]) for s, a in pieces)
        guess: list[torch.Tensor] = []
        for before, ahead in zip(base, states, strict=True):
            if not before.is_floating_point():
                guess.append(before)
                continue
            slope = (ahead[run - 1] - before[0]) / run
            steps = torch.arange(1, system.steps + 1, device=before.device, dtype=before.dtype)
            guess.append(before + steps.reshape(-1, *[1] * (before.dim() - 1)) * slope)
        return tuple(guess)


@dataclass(frozen=True)
class Given(Guess):
    """A user's function (or forecasting network) from the loop's operands to one ``(T, *shape)`` a carried output.

    Raises:
        ValueError: The function returns other shapes than the trajectory's.
    """

    function: Callable[..., States]

    @override
    def states(self, system: System) -> States:
        guess = tuple(self.function(*system.operands))
        base = system.base()
        found, wanted = [g.shape for g in guess], [b.shape for b in base]
        if found != wanted:
            raise ValueError(f"the guess has shapes {found}; the trajectory has {wanted}")
        return tuple(g.detach().to(b) for g, b in zip(guess, base, strict=True))
