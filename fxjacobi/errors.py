"""Every exception and warning of fxjacobi, each naming what happened, where, and what to do."""

from __future__ import annotations

__all__ = [
    "CaptureError",
    "CaptureWarning",
    "ExactnessError",
    "ExactnessWarning",
    "FxjacobiError",
    "GuardFailed",
    "GuessError",
    "PassError",
    "PlanError",
    "StateChangedError",
]


class FxjacobiError(Exception):
    """Base class of all errors raised by fxjacobi itself (never of the user's own)."""


class CaptureError(FxjacobiError):
    """The run could not be recorded as a graph.

    Args:
        message: What was met.
        site: ``file:line`` of the user's code, or ``None`` when there is none.
        remedy: What the user can do about it.
    """

    def __init__(self, message: str, *, site: str | None = None, remedy: str | None = None) -> None:
        self.site = site
        self.remedy = remedy
        where = f"{site}: " if site else ""
        what_to_do = f" Remedy: {remedy}" if remedy else ""
        super().__init__(f"{where}{message}{what_to_do}")


class StateChangedError(CaptureError):
    """A run changed state that is no tensor. The next may not: caches are filled once."""


class PassError(FxjacobiError):
    """A pass was given, or left behind, a graph that is not well formed."""


class PlanError(FxjacobiError):
    """A saved plan does not belong to this graph, device or torch build."""


class GuessError(FxjacobiError, ValueError, RuntimeError):
    """The user's function of a guess (:class:`fxjacobi.methods.Given`) gave something else than a trajectory."""


class ExactnessError(FxjacobiError):
    """A solved output differs from the ordinary run's."""


class GuardFailed(FxjacobiError):  # noqa: N818 - control flow of deoptimisation, not a user-facing error
    """A branch of the recorded run goes the other way on this data; the module runs the original."""


class CaptureWarning(UserWarning):
    """A model could not be captured and runs as it is."""


class ExactnessWarning(UserWarning):
    """A block's first result differed from the recorded run; it was demoted to sequential."""
