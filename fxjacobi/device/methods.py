"""Which device form a method has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override

from fxjacobi.device.chunked import ChunkedForm
from fxjacobi.device.runner import Refused
from fxjacobi.device.solve_form import SolveForm
from fxjacobi.device.windowed import WindowedForm
from fxjacobi.methods.chunked import Chunked
from fxjacobi.methods.jacobi import Jacobi
from fxjacobi.methods.windowed import Windowed

if TYPE_CHECKING:
    import torch

    from fxjacobi.device.form import Session
    from fxjacobi.device.operands import StaticOperands
    from fxjacobi.device.runner import GraphRunner
    from fxjacobi.solved_loop import SolvedLoop

__all__ = ["form_of"]


class _NoForm(SolveForm):
    """A method whose sweeps ask the host in between."""

    def __init__(self, solved: SolvedLoop, runner: GraphRunner, device: torch.device) -> None:
        super().__init__(solved, runner, device)
        self.refused = Refused(f"the sweeps of {type(solved.method).__name__} have no captured form")

    @override
    def build(self, operands: StaticOperands) -> Session | Refused:
        raise AssertionError("it is refused")


def form_of(solved: SolvedLoop, runner: GraphRunner, device: torch.device) -> SolveForm:
    """Return the device form of a solved loop's method."""
    match solved.method:
        case Chunked():
            return ChunkedForm(solved, runner, device)
        case Windowed() | Jacobi():
            return WindowedForm(solved, runner, device)
        case _:
            return _NoForm(solved, runner, device)
