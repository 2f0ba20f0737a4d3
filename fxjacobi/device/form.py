"""What all device forms of blocks share: captured programs by the layout of the operands, checked before they are used."""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxjacobi.bits import same_bits
from fxjacobi.device.capturable import NotCapturableError
from fxjacobi.device.operands import StaticOperands
from fxjacobi.device.runner import Refused, runner_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from fxjacobi.certificate import Solution
    from fxjacobi.device.runner import GraphRunner

__all__ = ["DeviceForm", "Explained", "Forms", "Session"]

_log = logging.getLogger(__name__)

_MISSES = 3
"""Solves in a row that a captured form could not finish, after which it is not tried again."""

_LAYOUTS = 4
"""Captures are kept for so many layouts of the operands; further ones run uncaptured."""


class Session(ABC):
    """The captured programs of one block for operands of one layout."""

    def __init__(self, operands: StaticOperands) -> None:
        self.operands = operands

    @abstractmethod
    def solve(self) -> tuple[tuple[Any, ...], Solution] | None:
        """Return results in memory of their own and the record; ``None`` where the block must run uncaptured.

        The operands are loaded. Nothing in it waits for the device but the reading of flags.
        """


class DeviceForm(ABC):
    """A block's way to run on a device.

    ``adopt`` captures after an uncaptured call and compares: a form that gives other bits is refused. ``__call__`` then
    serves every call whose operands fit. A refusal is kept, with its reason.

    Args:
        runner: What captures.
        device: Where.
        compare: Whether the first results must be those of the uncaptured run, bit for bit.
    """

    def __init__(self, runner: GraphRunner, device: torch.device, *, compare: bool = True) -> None:
        self.runner = runner
        self.device = device
        self.refused: Refused | None = None
        self._compare = compare
        self._sessions: list[Session] = []
        self._misses = 0
        self._order = runner.order(device)
        self._lock = threading.Lock()

    @abstractmethod
    def build(self, operands: StaticOperands) -> Session | Refused:
        """Capture the programs; the operands are loaded, and warming up may run on them."""

    def streamed(self) -> Collection[int]:
        """Return the operands whose parts the session copies itself."""
        return ()

    @property
    def reason(self) -> str:
        """What is captured, or why nothing is."""
        if self.refused is not None:
            return f"runs uncaptured: {self.refused.reason}"
        return self.describe() if self._sessions else ""

    @abstractmethod
    def describe(self) -> str:
        """Return what is captured, for the plan."""

    def __call__(self, operands: Sequence[Any]) -> tuple[tuple[Any, ...], Solution] | None:
        """Return the results and the record, or ``None`` where no captured program fits the call."""
        if self.refused is not None:
            return None
        with self._lock, self.runner.on(self.device), torch.no_grad():
            session = next((s for s in self._sessions if s.operands.fits(operands)), None)
            if session is None:
                return None
            solved = self._solve(session, operands)
            self._misses = 0 if solved is not None else self._misses + 1
            if self._misses >= _MISSES:
                self.refused = Refused("its captured sweeps did not finish, several times in a row")
            return solved

    def adopt(self, operands: Sequence[Any], wanted: Sequence[Any]) -> None:
        """Capture for operands like these, whose uncaptured results are ``wanted``."""
        if self.refused is not None or len(self._sessions) >= _LAYOUTS:
            return
        with self._lock, self.runner.on(self.device), torch.no_grad():
            if any(session.operands.fits(operands) for session in self._sessions):
                return
            self.refused = self._adopted(operands, wanted)
        if self.refused is not None:
            _log.info("%s: %s", type(self).__name__, self.refused.reason)

    def _adopted(self, operands: Sequence[Any], wanted: Sequence[Any]) -> Refused | None:
        refused = StaticOperands.refusal(operands, self.device)
        if refused is not None:
            return refused
        try:
            static = StaticOperands(operands, self.device, self.streamed())
            static.load(operands)
            session = self.build(static)
            if isinstance(session, Refused):
                return session
            solved = self._solve(session, operands)
        except torch.OutOfMemoryError:
            return Refused("its captured programs do not fit in memory")
        except NotCapturableError as error:
            return Refused(str(error))
        except Exception as error:  # noqa: BLE001 - the uncaptured results are right; a fault must not take them away
            _log.exception("the device form of a block failed")
            return Refused(f"its device form failed ({type(error).__name__}: {error}); please report this")
        if solved is not None and self._compare and not _equal(solved[0], wanted):
            return Refused("its captured programs give other bits than the operations one by one")
        self._sessions.append(session)
        return None

    def _solve(self, session: Session, operands: Sequence[Any]) -> tuple[tuple[Any, ...], Solution] | None:
        self._order.enter()
        try:
            session.operands.load(operands)
            return session.solve()
        finally:
            self._order.leave()


class Forms:
    """The device form of one block, made when the block is first called on a device that captures.

    Args:
        make: Makes it.
    """

    def __init__(self, make: Callable[[GraphRunner, torch.device], DeviceForm]) -> None:
        self._make = make
        self._forms: dict[tuple[int, torch.device], DeviceForm] = {}

    def explain(self, reason: str) -> str:
        """Return ``reason`` with what the forms say: what is captured, or why nothing is."""
        return "; ".join(part for part in (reason, *(form.reason for form in self._forms.values())) if part)

    def of(self, operands: Sequence[Any]) -> DeviceForm | None:
        """Return the form for a call with ``operands``, or ``None`` where nothing captures: on the CPU, for one."""
        found = runner_of(operands)
        if found is None:
            return None
        runner, device = found
        key = (id(runner), device)
        if key not in self._forms:
            self._forms[key] = self._make(runner, device)
        return self._forms[key]


class Explained(nn.Module):
    """A block with device forms, which says why it is solved so."""

    _forms: Forms
    _reason: str = ""

    @property
    def reason(self) -> str:
        """Why it is solved so, and what of it is captured on a device."""
        return self._forms.explain(self._reason)

    @reason.setter
    def reason(self, reason: str) -> None:
        self._reason = reason


def _equal(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether results are the same to every bit (any NaN is any other)."""
    return all(
        _same(a, b.detach()) if isinstance(b, torch.Tensor) else bool(a == b)
        for a, b in zip(found, wanted, strict=True)
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if (a.shape, a.stride(), a.dtype) != (b.shape, b.stride(), b.dtype):
        return False
    if same_bits(a, b) or not a.is_floating_point():
        return same_bits(a, b)
    zeros = torch.where(a.isnan(), 0.0, a), torch.where(b.isnan(), 0.0, b)
    return torch.equal(a.isnan(), b.isnan()) and same_bits(*zeros)
