"""Initial guesses: they never change the answer, only how many sweeps lead to it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from fxjacobi.errors import GuessError
from fxjacobi.loops import Scanned

if TYPE_CHECKING:
    from collections.abc import Callable

    from fxjacobi.system import States, System

__all__ = ["Base", "Extrapolated", "Given", "Guess", "Previous", "Swept", "describe_guess", "guess_of"]


class Guess(ABC):
    """Where a solve starts. Subclasses are final and frozen; their fields are options."""

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
    """The trajectory of an earlier solve (streams, training steps); the base values where its shapes do not fit.

    Args:
        trajectory: One ``(T, *shape)`` for each component of the state.
    """

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
    """A polynomial along ``t`` through the values before the loop and after ``run``, ``2 run`` ... ``order run`` steps.

    ``order=1`` is the line ``s_t = s_{-1} + (t + 1) (s_{run-1} - s_{-1}) / run``, ``order=2`` the parabola, as a Taylor
    polynomial with differences for derivatives (Newton's forward form). For chains that move smoothly, as samplers do.
    It costs ``order run`` steps in order. Integers keep their base values.

    Raises:
        ValueError: ``run`` or ``order`` is not positive.
        TypeError: One of them is no integer.
    """

    run: int = 1
    order: int = 1

    def __post_init__(self) -> None:
        _check_integers(self, "run", "order")
        if self.run < 1:
            raise ValueError(f"a line needs at least 1 step, not {self.run}")
        if self.order < 1:
            raise ValueError(f"a polynomial's order must be at least 1, not {self.order}")

    @override
    def states(self, system: System) -> States:
        base = system.base()
        run = min(self.run, system.steps)
        order = min(self.order, system.steps // run)
        states = base
        for step in range(order * run):
            after = system.next_states(states, step, step + 1)
            pieces = zip(states, after, strict=True)
            states = tuple(torch.cat([s[:step], a, s[step + 1 :]]) for s, a in pieces)
        guess: list[torch.Tensor] = []
        for before, ahead in zip(base, states, strict=True):
            if not before.is_floating_point():
                guess.append(before)
                continue
            differences = [before[0], *(ahead[(k + 1) * run - 1] for k in range(order))]
            at = torch.arange(1, system.steps + 1, device=before.device, dtype=before.dtype) / run
            at = at.reshape(-1, *[1] * (before.dim() - 1))
            value, weight = before.clone(memory_format=torch.contiguous_format), torch.ones_like(at)
            for k in range(order):
                differences = [b - a for a, b in pairwise(differences)]
                weight = weight * (at - k) / (k + 1)
                value += weight * differences[0]
            guess.append(value)
        return tuple(guess)


@dataclass(frozen=True)
class Swept(Guess):
    """``sweeps`` Jacobi sweeps from the base values, extrapolated to where equal ratios of their updates lead.

    With ``u = s^k - s^{k-1}`` and ``v = s^{k+1} - s^k`` the last two updates of a step, and ``q = <v, u> / <u, u>``:
    ``s = s^{k+1} + v q / (1 - q)`` where ``|q| < 1``, else ``s^{k+1}`` (Aitken's delta-squared process, a vector at a
    time). For contractive recurrences. Integers keep their swept values.

    Raises:
        ValueError: There are fewer than two sweeps.
        TypeError: ``sweeps`` is no integer.
    """

    sweeps: int = 2

    def __post_init__(self) -> None:
        _check_integers(self, "sweeps")
        if self.sweeps < 2:
            raise ValueError(f"an extrapolation over sweeps needs at least 2, not {self.sweeps}")

    @override
    def states(self, system: System) -> States:
        history = [system.base()]
        for _ in range(self.sweeps):
            history = [*history[-2:], system.next_states(history[-1])]
        guess: list[torch.Tensor] = []
        for first, second, third in zip(*history, strict=True):
            if not third.is_floating_point():
                guess.append(third)
                continue
            before, after = ((b - a).reshape(system.steps, -1) for a, b in ((first, second), (second, third)))
            ratio = (after * before).sum(1) / (before * before).sum(1)
            factor = torch.where(ratio.abs() < 1, ratio / (1 - ratio), torch.zeros_like(ratio))
            guess.append(third + (factor.unsqueeze(1) * after).view_as(third))
        return tuple(guess)


@dataclass(frozen=True)
class Given(Guess):
    """What a user's function (a small forecasting network, say) makes of the loop's inputs.

    ``function(base, inputs)`` gets the base trajectory, one ``(T, *shape)`` for each component of the state, and the
    stacked inputs, one ``(T, ...)`` for each tensor that the loop reads a slice of at every step. It returns a
    trajectory shaped like ``base``, or ``None`` where it has no guess. It must write to neither; numbers that it draws do
    not advance the random state.

    Raises:
        TypeError: ``function`` is not callable.
        GuessError: The function raised, returned other shapes than the trajectory's, or wrote to what it was given, which
            is then as it was before (a ``ValueError`` and a ``RuntimeError``, too).
    """

    function: Callable[[States, tuple[torch.Tensor, ...]], States | None]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"a given guess needs a function, not {type(self.function).__name__}")

    @override
    def states(self, system: System) -> States:
        base = system.base()
        inputs = tuple(
            v for v, b in zip(system.fixed(slice(None)), system.loop.bindings, strict=True) if isinstance(b, Scanned)
        )
        given = (*base, *inputs)
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        # Copies of what it may spoil: the inputs are the caller's own memory, or the parameters of the model.
        own = tuple(t.clone() for t in given)
        versions = _versions(own)
        with torch.random.fork_rng(devices=list(devices)), torch.no_grad():
            try:
                found = self.function(own[: len(base)], own[len(base) :])
            except Exception as error:
                raise GuessError(f"the function of the guess raised {type(error).__name__}: {error}") from error
        if _versions(own) != versions:
            raise GuessError("the function of the guess wrote to what it was given")
        if found is None:
            return base
        several: Any = found
        if not isinstance(several, (tuple, list)) or not all(isinstance(g, torch.Tensor) for g in several):
            raise GuessError(f"the function of the guess returned {type(found).__name__}, not a tuple of tensors")
        shapes, wanted = [tuple(g.shape) for g in found], [tuple(b.shape) for b in base]
        if shapes != wanted:
            raise GuessError(f"the guess has shapes {shapes}; the trajectory has {wanted}")
        return tuple(g.detach().to(b) for g, b in zip(found, base, strict=True))


def _check_integers(guess: Guess, *names: str) -> None:
    for name in names:
        value = getattr(guess, name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} of {type(guess).__name__} must be an integer, not {value!r}")


def _versions(tensors: tuple[torch.Tensor, ...]) -> list[int]:
    return [-1 if t.is_inference() else t._version for t in tensors]


_SAVED: tuple[type[Guess], ...] = (Base, Extrapolated, Swept)


def describe_guess(guess: Guess) -> dict[str, Any]:
    """A guess as JSON: its name, and its options where they are numbers."""
    options = {}
    if isinstance(guess, _SAVED):
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(guess)  # type: ignore[arg-type]
        options = {f.name: getattr(guess, f.name) for f in fields}
    return {"name": type(guess).__name__, "options": options}


def guess_of(entry: dict[str, Any]) -> Guess | None:
    """Undo :func:`describe_guess`; ``None`` where the guess holds a function or tensors, which JSON does not.

    Raises:
        KeyError, TypeError, ValueError: The entry describes no guess.
    """
    every: tuple[type[Guess], ...] = (*_SAVED, Previous, Given)
    kind = {kind.__name__: kind for kind in every}[entry["name"]]
    return kind(**entry["options"]) if kind in _SAVED else None
