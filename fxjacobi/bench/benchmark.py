"""What a benchmark is: a name and rows of measurements, each row with both runs measured in one process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Benchmark", "Row", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What the person who runs the benchmarks chose.

    Args:
        device: Where the models run.
        rounds: Rounds of interleaved timing; the medians are reported.
        seed: Seed of weights and inputs.
        quick: Tiny sizes, to see that a benchmark runs; its numbers say nothing.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rounds: int = 5
    seed: int = 0
    quick: bool = False


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table.

    Args:
        case: What was measured, for instance ``"batch 16"``.
        values: Its numbers by column; a column that ends in ``_s`` holds seconds, in ``_us`` microseconds.
    """

    case: str
    values: Mapping[str, float | int | str | bool]


class Benchmark(ABC):
    """One question about speed. A result that is not equal to the ordinary run's raises: it has no speed."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def rows(self, settings: Settings) -> Iterator[Row]:
        """Measure, and yield one row after the other as they are done."""

    def cases(self) -> tuple[str, ...]:
        """The rows of a full run, by name, where a table must say which of them were not measured."""
        return ()
