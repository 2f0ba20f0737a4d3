"""What leaving final samples out of later sweeps may gain, from how many samples each sweep of earlier solves changed.

    n_k samples of B were changed by sweep k of S, a whole sweep takes w, one of b samples f:
    gained at most    sum over k with n_k <= b of (1 - n_k / B) w,  less w for the sweep that confirms the answer
    gained in truth   r (w - f) - w,  with r sweeps to go once n_k <= b

A smaller program has to be made and compared before it is used. That is done only when solves have forgone as much time
as it takes, so it never costs more than it may have gained: where samples end within a sweep or two of one another, it is
hardly ever done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SampleGain"]

_SWEEPS_OF_A_TRIAL = 2
"""Sweeps of fewer samples that a comparison takes beside its program, each at most a whole one's time."""


class SampleGain:
    """See the module's docstring.

    Args:
        samples: How many samples there are.
        size: How many the smaller program takes.
        build_s: Seconds that making such a program takes.

    Attributes:
        forgone_s: What earlier solves might have gained at most.
        sweeps: How many sweeps the last solve took; ``None`` before the first.
        whole_s: Seconds of a whole sweep, ``part_s`` of one of fewer samples, as compared; 0 before.
    """

    def __init__(self, samples: int, size: int, build_s: float) -> None:
        self.samples = samples
        self.size = size
        self.build_s = build_s
        self.forgone_s = 0.0
        self.sweeps: int | None = None
        self.whole_s = self.part_s = 0.0

    def possible(self, changed: Sequence[int], whole_s: float) -> float:
        """Return the seconds that sweeps of fewer samples could have saved, after sweeps that ``changed`` so many."""
        return whole_s * sum(1 - count / self.samples for count in changed if count <= self.size)

    def record(self, changed: Sequence[int], whole_s: float) -> None:
        """Remember a solve that ran all samples: how many each sweep changed, and a sweep's seconds."""
        self.sweeps = len(changed)
        # After the last sweep there is nothing to run, and an answer of fewer samples would have to be confirmed.
        self.forgone_s += max(0.0, self.possible(changed[:-1], whole_s) - whole_s)

    def worth_trying(self, changed: Sequence[int], whole_s: float) -> bool:
        """Whether as much was forgone, in earlier solves and in the sweeps of this one, as a trial costs."""
        cost = self.build_s + _SWEEPS_OF_A_TRIAL * whole_s
        return self.forgone_s + self.possible(changed[:-1], whole_s) >= cost

    def worth_using(self, left: int | None, *, confirmed: bool) -> bool:
        """Whether sweeps of fewer samples gain with so many sweeps to go.

        Args:
            left: How many sweeps earlier solves let expect; ``None``: unknown.
            confirmed: Whether a whole sweep must confirm the answer.
        """
        return left is None or left * (self.whole_s - self.part_s) > confirmed * self.whole_s
