"""The contract of a pass: requires -> apply -> ensures, functional, checked after."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import fx  # noqa: TC002 - dataclass fields are resolved at run time

from fxjacobi.graph import check

__all__ = ["Pass", "PassResult"]


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass returns: a new module (or the one it was given, untouched) and whether it changed anything."""

    module: fx.GraphModule
    modified: bool

    @classmethod
    def of(cls, result: fx.GraphModule, given: fx.GraphModule) -> PassResult:
        """Return ``result``, which is ``given`` itself where nothing was changed."""
        return cls(result, result is not given)


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of a graph. Fields of a subclass are its options; ``run`` checks both sides of ``apply``."""

    name: ClassVar[str]

    def requires(self, module: fx.GraphModule) -> None:
        """Raise :class:`fxjacobi.errors.PassError` if ``module`` is not what this pass takes.

        By default any well-formed graph will do; what a pass has just ensured is not checked twice.
        """
        if not module.meta.get("well_formed"):
            check(module, after=f"(before {self.name})")

    @abstractmethod
    def apply(self, module: fx.GraphModule) -> PassResult:
        """Return the rewritten graph; never change ``module`` itself."""

    def ensures(self, module: fx.GraphModule) -> None:
        """Raise :class:`fxjacobi.errors.PassError` if the rewritten graph breaks what this pass promises."""
        check(module, after=self.name)
        module.meta["well_formed"] = True

    def run(self, module: fx.GraphModule) -> PassResult:
        """Check, rewrite, check."""
        self.requires(module)
        result = self.apply(module)
        if result.module is not module:  # what was well formed still is
            self.ensures(result.module)
        return result
