"""Why a solve may stop: the certificate that its values are the ordinary run's, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Certificate", "Solution"]


class Certificate(Enum):
    """The reason, as a sentence, for which the values that a solve returned are the answer."""

    SEQUENTIAL = "every step was run in the ordinary order"
    INDEPENDENT = "the equations do not depend on one another, so one batched evaluation is the answer"
    REPEATED = "a sweep changed nothing, so the iterate is the sequential answer"
    CYCLED = "an earlier state came back bit for bit, so all later states are known"
    EXACT_PREFIX = "the exact prefix reached the last equation"
    COMPLETED = "as many sweeps as the dependence graph is deep were run"
    TOLERANCE = "the last update was within the tolerance asked for"
    RESIDUAL = (
        "every equation holds within the tolerance asked for, or rounding where that is more, and the updates die out"
    )
    SCANNED = (
        "the equations are affine: one scan solved them, and each holds within the tolerance asked for, or rounding"
    )
    IN_MACHINE_CODE = (
        "the steps ran in the ordinary order in machine code; every equation that was looked at holds within the tolerance "
        "asked for, and so does what rounding came to along the steps"
    )
    NOT_FINITE = "a value was not finite where the proof needs it to be; the rest was run in the ordinary order"
    FELL_BACK = (
        "the sweeps did not converge within their bound, or rounding may come to more than the tolerance; "
        "the rest was run in the ordinary order"
    )


@dataclass(frozen=True, slots=True)
class Solution:
    """What a solve did.

    Args:
        sweeps: How many times the body was evaluated (a batched evaluation of all equations counts once).
        certificate: Why it could stop there.
        residual: Largest ``max |s_t - h(s_{t-1})| / max |s_t|`` over the steps of the returned values, where it was
            measured; ``0.0`` where every equation holds bit for bit.
        prefixes: After each sweep, how many leading steps were known to be final.
        completed: How many steps were run one by one at the end, in the ordinary order.
        window: How many steps were solved together at most, where memory did not allow all; ``None`` where it did.
        active: For each sweep, how many samples of the batch it ran; empty where none were left out.
    """

    sweeps: int
    certificate: Certificate
    residual: float | None = None
    prefixes: tuple[int, ...] = ()
    completed: int = 0
    window: int | None = None
    active: tuple[int, ...] = ()
