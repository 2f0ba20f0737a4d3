"""Writes the source of a generated program, and remembers its modules, arguments and features."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fxjacobi.testing.program import HEADER, Argument, Layout

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Sizes", "Writer"]


@dataclass(frozen=True)
class Sizes:
    """The sizes and the dtype of a generated program: sequences ``(T, B, H)``, states ``(B, H)``.

    Args:
        steps: ``T``.
        batch: ``B``.
        hidden: ``H``.
        dtype: Dtype of every sequence and state.
    """

    steps: int
    batch: int
    hidden: int
    dtype: torch.dtype

    @property
    def kind(self) -> str:
        """``"float"``, ``"int"``, ``"bool"`` or ``"complex"``."""
        if self.dtype == torch.bool:
            return "bool"
        if self.dtype.is_complex:
            return "complex"
        return "float" if self.dtype.is_floating_point else "int"


@dataclass
class Writer:
    """The program under construction.

    Args:
        sizes: Its sizes and dtype.
        modular: Whether it is an ``nn.Module``, which may hold submodules, parameters and buffers.
    """

    sizes: Sizes
    modular: bool
    lines: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    arguments: list[Argument] = field(default_factory=list)
    features: set[str] = field(default_factory=set)
    states: list[str] = field(default_factory=list)
    sequences: list[str] = field(default_factory=list)
    depth: int = 0
    count: int = 0

    @property
    def device(self) -> str:
        """The expression for the device that the program runs on: that of its first argument."""
        return f"{self.arguments[0].name}.device"

    def name(self, prefix: str) -> str:
        """Return a name that is not in use."""
        self.count += 1
        return f"{prefix}{self.count}"

    def line(self, text: str) -> None:
        """Append one statement at the present indentation."""
        self.lines.append("    " * self.depth + text)

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        """Open a compound statement; what is written inside the context is its suite."""
        self.line(header)
        self.depth += 1
        before = len(self.lines)
        yield
        if len(self.lines) == before:
            self.line("pass")
        self.depth -= 1

    def argument(
        self,
        prefix: str,
        shape: tuple[int, ...],
        layout: Layout = Layout.CONTIGUOUS,
        scale: float = 1.0,
        specials: tuple[tuple[int, float], ...] = (),
    ) -> str:
        """Add a tensor argument and return its name."""
        name = self.name(prefix)
        self.arguments.append(Argument(name, shape, self.sizes.dtype, layout, scale, specials))
        return name

    def module(self, constructor: str) -> str:
        """Add a submodule and return the expression that names it; ``DTYPE`` stands for the program's dtype."""
        name = self.name("part")
        self.setup.append(f"self.{name} = {constructor.replace('DTYPE', str(self.sizes.dtype))}")
        return f"self.{name}"

    def buffer(self, value: str) -> str:
        """Add a buffer and return the expression that names it."""
        name = self.name("state")
        self.setup.append(f'self.register_buffer("{name}", {value})')
        return f"self.{name}"

    def attribute(self, value: str) -> str:
        """Add a plain attribute and return the expression that names it."""
        name = self.name("memory")
        self.setup.append(f"self.{name} = {value}")
        return f"self.{name}"

    def source(self) -> str:
        """Return the whole program."""
        names = ", ".join(argument.name for argument in self.arguments)
        if not self.modular:
            body = "".join(f"    {line}\n" for line in self.lines)
            return f"{HEADER}def program({names}):\n{body}"
        setup = "".join(f"        {line}\n" for line in ["super().__init__()", *self.setup])
        body = "".join(f"        {line}\n" for line in self.lines)
        return f"{HEADER}class Program(nn.Module):\n    def __init__(self):\n{setup}\n    def forward(self, {names}):\n{body}"
