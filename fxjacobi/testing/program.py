"""A generated PyTorch program: readable source, a model built from it, and arguments made from a seed."""

from __future__ import annotations

import hashlib
import linecache
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Argument", "Layout", "Program"]

HEADER = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n\n\n"


class Layout(Enum):
    """How a tensor argument lies in memory."""

    CONTIGUOUS = "contiguous"
    TRANSPOSED = "its last two dimensions transposed in memory"
    STRIDED = "every second element of a larger tensor"
    OFFSET = "starting one element into its storage"


@dataclass(frozen=True)
class Argument:
    """One tensor argument of a program.

    Args:
        name: Its name in the source.
        shape: Its shape.
        dtype: Its dtype.
        layout: How it lies in memory.
        scale: Magnitude of its random values.
        specials: (position modulo the number of elements, value) of elements that are set explicitly.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout = Layout.CONTIGUOUS
    scale: float = 1.0
    specials: tuple[tuple[int, float], ...] = ()

    def make(self, generator: torch.Generator, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the tensor on ``device``, its bulk drawn from ``generator``, which is the CPU's: equal everywhere."""
        values = self._values(generator)
        for position, special in self.specials if values.numel() else ():
            values.view(-1)[position % values.numel()] = special
        return self._lay_out(values.to(device))

    def _values(self, generator: torch.Generator) -> torch.Tensor:
        if self.dtype == torch.bool:
            return torch.randint(0, 2, self.shape, generator=generator).to(torch.bool)
        if not (self.dtype.is_floating_point or self.dtype.is_complex):
            return torch.randint(-9, 10, self.shape, generator=generator).to(self.dtype)
        drawn = torch.complex128 if self.dtype.is_complex else torch.float64
        return (torch.randn(self.shape, generator=generator, dtype=drawn) * self.scale).to(self.dtype)

    def _lay_out(self, values: torch.Tensor) -> torch.Tensor:
        if self.layout is Layout.TRANSPOSED and values.ndim >= 2:
            return values.transpose(-1, -2).contiguous().transpose(-1, -2)
        if self.layout is Layout.STRIDED:
            larger = values.new_zeros(*self.shape[:-1], 2 * self.shape[-1])
            larger[..., ::2] = values
            return larger[..., ::2]
        if self.layout is Layout.OFFSET:
            storage = values.new_zeros(values.numel() + 1)
            storage[1:] = values.reshape(-1)
            return storage[1:].view(self.shape)
        return values

    def __str__(self) -> str:
        notes = [] if self.layout is Layout.CONTIGUOUS else [self.layout.value]
        notes += [f"element {position} is {value!r}" for position, value in self.specials]
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}: {dtype}{list(self.shape)}{', ' if notes else ''}{', '.join(notes)}"


@dataclass(frozen=True, repr=False)
class Program:
    """A generated program; ``repr`` is its source, ready to paste.

    Args:
        source: Python that defines ``Program``, an ``nn.Module``, or ``program``, a function.
        arguments: Its arguments.
        features: What occurs in it, for statistics: ``"lstm"``, ``"branch"``, ``"batch 0"`` ...
        grad: Whether it is meant to run with grad enabled.
        seed: Seed of its parameters.
    """

    source: str
    arguments: tuple[Argument, ...]
    features: frozenset[str]
    grad: bool = False
    seed: int = 0

    def build(self, device: torch.device | str = "cpu") -> Callable[..., Any]:
        """Return the model: a new instance of the module with seeded parameters on ``device``, or the function.

        Raises:
            ValueError: The source defines neither.
        """
        digest = hashlib.sha256(self.source.encode()).hexdigest()[:12]
        file = f"<fxjacobi.testing {digest}>"
        # inspect, tracebacks and file:line of a capture find the text here.
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        namespace: dict[str, Any] = {"__name__": f"fxjacobi_program_{digest}"}
        exec(compile(self.source, file, "exec"), namespace)  # noqa: S102 - the text comes from programs(), not from outside
        if "Program" in namespace:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model: Callable[..., Any] = namespace["Program"]().to(device)
            return model
        if "program" in namespace:
            function: Callable[..., Any] = namespace["program"]
            return function
        raise ValueError("the source of a Program defines `class Program` or `def program`")

    def make_args(self, seed: int = 0, device: torch.device | str = "cpu") -> tuple[torch.Tensor, ...]:
        """Return new arguments on ``device``; the same seed gives the same values."""
        generator = torch.Generator().manual_seed(seed)
        return tuple(argument.make(generator, device) for argument in self.arguments)

    def __call__(self, *arguments: Any) -> Any:
        """Build the model and run it once on ``arguments`` (by default, on ``make_args()``)."""
        with torch.set_grad_enabled(self.grad):
            return self.build()(*(arguments or self.make_args()))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: ARG002 - the protocol of IPython.lib.pretty
        # Hypothesis prints a falsifying example through this; it would print the dataclass's fields otherwise.
        printer.text(repr(self))

    def __repr__(self) -> str:
        notes = [f"# {argument}" for argument in self.arguments]
        notes.append(f"# grad {'enabled' if self.grad else 'disabled'}, parameters from seed {self.seed}")
        return self.source + "\n\n" + "\n".join(notes) + "\n"
