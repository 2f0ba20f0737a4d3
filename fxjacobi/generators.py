"""The random generators that a run may draw from, and their states."""

from __future__ import annotations

import random
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fxjacobi.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fxjacobi.graph import Site
    from fxjacobi.watch import Watch

__all__ = ["PythonGenerators", "RandomState", "check_own_generators", "generator_key"]


@dataclass(frozen=True)
class RandomState:
    """The state of every generator that a call may draw from: torch's default ones, and the program's own."""

    cpu: torch.Tensor
    cuda: tuple[torch.Tensor, ...]
    own: tuple[tuple[torch.Generator, torch.Tensor], ...] = ()

    @classmethod
    def save(cls, own: Iterable[torch.Generator] = ()) -> RandomState:
        """The present state of the CPU's generator, of every device's where CUDA is in use, and of ``own``."""
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else ()
        return cls(torch.get_rng_state(), cuda, tuple([(g, g.get_state()) for g in own]))

    def restore(self) -> None:
        """Put every generator back."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
        for generator, state in self.own:
            generator.set_state(state)


class PythonGenerators:
    """Python's and NumPy's generators that are known before a run: the global ones, and those that ``watch`` reached."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._before = _global_state()
        self._reached = {id(each): (each, _state(each)) for each in _random_objects(watch.objects())}

    def check_untouched(self) -> None:
        """Compare with now: what a run drew from them is no part of its graph.

        Raises:
            CaptureError: One was drawn from.
        """
        if self._before != _global_state():
            raise CaptureError("the run drew from Python's or NumPy's generator", remedy="draw with torch")
        for each, before in self._reached.values():
            if before != _state(each):
                raise CaptureError(f"the run drew from a {_kind(each)}", remedy="draw with torch")

    def check_known(self) -> None:
        """Look for others, once the watch has seen what the run showed.

        Raises:
            CaptureError: There is one, and nobody can tell whether it was drawn from.
        """
        for each in _random_objects(self._watch.objects(mentioned=True)):
            if id(each) not in self._reached:
                raise CaptureError(
                    f"code of the run names a {_kind(each)}, and may have drawn from it", remedy="draw with torch"
                )


def _kind(each: Any) -> str:
    return f"{type(each).__module__}.{type(each).__name__}"


def _random_objects(reached: Iterable[Any]) -> list[Any]:
    """The random objects among what was ``reached``, by themselves or as what a method of theirs in C is bound to."""
    kinds = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
    found = []
    for value in reached:
        each = value.__self__ if isinstance(value, types.BuiltinMethodType) else value
        if isinstance(each, kinds) and not isinstance(each, random.SystemRandom):
            found.append(each)
    return found


def _global_state() -> Any:
    return random.getstate(), _comparable(np.random.get_state())


def _state(each: Any) -> Any:
    if isinstance(each, random.Random):
        return each.getstate()
    if isinstance(each, np.random.RandomState):
        return _comparable(each.get_state())
    return _comparable((each.bit_generator if isinstance(each, np.random.Generator) else each).state)


def _comparable(state: Any) -> Any:
    """NumPy's nested ``state`` with bytes in the place of arrays."""
    if isinstance(state, dict):
        return {key: _comparable(item) for key, item in state.items()}
    if isinstance(state, tuple):
        return tuple([_comparable(item) for item in state])
    return state.tobytes() if isinstance(state, np.ndarray) else state


def generator_key(generator: torch.Generator) -> int:
    """Return the address of ``generator``'s state: the dispatcher hands over another Python object at each draw."""
    key: int = generator._cdata  # type: ignore[attr-defined]
    return key


def check_own_generators(
    met: Mapping[int, tuple[torch.Generator, torch.Tensor, Site | None]], watch: Watch
) -> tuple[tuple[torch.Generator, torch.Tensor], ...]:
    """Return the generators that a run drew from by name, with their states before it.

    Raises:
        CaptureError: One was not there before the run, or where the next call would not look for it.
    """
    known = [torch.default_generator, *torch.cuda.default_generators]
    known += [value for value in watch.objects() if isinstance(value, torch.Generator)]
    keys = {generator_key(generator) for generator in known}
    for key, (_, _, site) in met.items():
        if key not in keys:
            raise CaptureError(
                "a draw from a generator that is neither an argument nor reachable from the model",
                site=str(site) if site else None,
                remedy="make it outside the compiled function, and pass it as an argument",
            )
    return tuple([(generator, state) for generator, state, _ in met.values()])
