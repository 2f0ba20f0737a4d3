"""The module that :func:`fxjacobi.compile` returns."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C import _functorch
from torch.utils import _python_dispatch
from typing_extensions import override

from fxjacobi.compiler import specialise
from fxjacobi.errors import PlanError
from fxjacobi.methods.guess import describe_guess
from fxjacobi.plan import Plan
from fxjacobi.report import Report
from fxjacobi.saved_plan import Decision, SavedPlan, describe_method
from fxjacobi.settled_heap import settled_heap
from fxjacobi.signature import signature
from fxjacobi.trees import PRIMITIVES
from fxjacobi.watch import Wrapper

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable
    from pathlib import Path

    from torch import fx

    from fxjacobi.options import Options
    from fxjacobi.specialisation import Specialisation

__all__ = ["SolvedModule"]

_MAX_SPECIALISATIONS = 8  # of one signature: a model whose Python values change at every call is run as it is


_MAX_SIGNATURES = 256  # that are compiled; calls of further ones run the original
_MAX_PLAIN = 64  # signatures of calls that run the original by the short way


def _shapes(args: tuple[Any, ...]) -> Hashable | None:
    """Shapes, dtypes and what else the choice of a specialisation depended on, if all arguments are tensors."""
    key: list[Any] = [torch.is_grad_enabled()]
    for argument in args:
        if type(argument) is not torch.Tensor:
            return None
        key += (argument.shape, argument.dtype, argument.requires_grad)
    return tuple(key)


def _changed(known: list[Specialisation]) -> str:
    """Name what the last specialisation no longer finds as it was."""
    watch = known[-1].capture.watch if known and known[-1].capture is not None else None
    changes = watch.changes() if watch is not None else []
    if not changes:
        return "not by assignment"
    first = changes[0]
    values = f" from {first.before!r:.40} to {first.after!r:.40}" if isinstance(first.before, PRIMITIVES) else ""
    return f"{first.name}{values}"


class SolvedModule(nn.Module, Wrapper):
    """Behaves as the callable it was made from, sooner; see :func:`fxjacobi.compile`.

    Attributes:
        plan: The plan of the specialisation that the last call used.
        report: What the last call did.
        stages: The graph after every pass, by the pass's name, of that specialisation.
    """

    def __init__(self, model: Callable[..., Any], options: Options) -> None:
        super().__init__()
        # A module is registered, so that parameters(), to() and train() reach it; a function is a plain attribute.
        self._original = model
        self._options = options
        self._specialisations: dict[Hashable, list[Specialisation]] = {}
        self._plain: dict[Hashable, Specialisation] = {}
        self._last: Specialisation | None = None
        self._lock = threading.RLock()
        if isinstance(model, nn.Module):
            self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the original returns, and leave behind what it leaves."""
        if _functorch.peek_interpreter_stack() is not None:  # inside a transform of torch.func: let it see the original
            return self._original(*args, **kwargs)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            # A CUDA graph of the user's own holds a fixed sequence of kernels; a solve learns its sweeps as it goes.
            return self._original(*args, **kwargs)
        # Where nothing is gained, the original is always right: a key of shapes alone finds those calls.
        plain = _shapes(args) if not kwargs and self._plain else None
        if plain is not None:
            short = self._plain.get(plain)
            if short is not None:
                self._last = short
                return self._original(*args)
        key, tensors = signature(args, kwargs)
        for specialisation in self._specialisations.get(key, ()):
            if specialisation.valid() and not specialisation.provisional:
                self._last = specialisation
                if specialisation.module is None and not kwargs:
                    self._remember(args, specialisation)
                return specialisation(tensors, args, kwargs)
        if _python_dispatch._get_current_dispatch_mode_stack():
            return self._original(*args, **kwargs)  # inside another tracer: let it see the original
        if len(self._specialisations) >= _MAX_SIGNATURES and key not in self._specialisations:
            return self._original(*args, **kwargs)  # arguments that are new objects at every call
        with self._lock, settled_heap():
            known = self._specialisations.setdefault(key, [])
            again = any(s.provisional for s in known)
            changed = _changed(known)
            result, specialisation = specialise(self._original, args, kwargs, self._options, again=again)
            known[:] = [s for s in known if not s.provisional]
            if len(known) >= _MAX_SPECIALISATIONS:
                specialisation.retire(
                    f"Python values that the model reads changed in {len(known)} calls, the last time {changed}: "
                    "keep what changes with each call in a tensor argument, or out of the model"
                )
            known.append(specialisation)
            self._last = specialisation
        return result

    @override
    def wrapped(self) -> Any:
        return self._original

    def _remember(self, args: tuple[Any, ...], specialisation: Specialisation) -> None:
        """Take the short way for calls like this one, for which the original runs."""
        shapes = _shapes(args)
        if shapes is not None and len(self._plain) < _MAX_PLAIN:
            specialisation.report = Report(False, specialisation.plan.reason)
            self._plain[shapes] = specialisation

    @property
    def plan(self) -> Plan:
        """The plan of the last call's specialisation."""
        if self._last is None:
            return Plan((), (), False, "not called yet: the first call records and plans")
        return self._last.current_plan()

    @property
    def report(self) -> Report:
        """What the last call did."""
        return self._last.report if self._last is not None else Report(False, "not called yet")

    @property
    def stages(self) -> dict[str, fx.GraphModule]:
        """The graph after every pass, by name; ``.code`` is its Python."""
        return dict(self._last.stages) if self._last is not None else {}

    def save_plan(self, path: str | Path) -> None:
        """Write what planning measured as JSON, for ``fxjacobi.compile(model, plan=path)``.

        Raises:
            PlanError: No call has been compiled yet.
        """
        if not self._specialisations:
            raise PlanError("nothing was compiled yet: call the module once before saving its plan")
        options = self._options
        guess = describe_guess(options.guess) if options.guess is not None else None
        saved = SavedPlan(rtol=options.rtol, atol=options.atol, warm_start=options.warm_start, guess=guess)
        for specialisation in (s for known in self._specialisations.values() for s in known):
            plan = specialisation.plan
            if specialisation.graph_hash:
                methods = tuple(describe_method(m) for m in specialisation.methods)
                saved.decisions[specialisation.graph_hash] = Decision(
                    plan.solved, plan.reason, plan.ordinary_s, plan.solved_s, methods
                )
        saved.save(path)

    def train(self, mode: bool = True) -> SolvedModule:
        """As ``nn.Module.train``, on the original too."""
        super().train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original") or self.__dict__.get("_modules", {}).get("_original")
            if original is None:
                raise
            return getattr(original, name)

    def extra_repr(self) -> str:
        """How many signatures were specialised."""
        return f"{len(self._specialisations)} signatures"
