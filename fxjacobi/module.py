"""The module that :func:`fxjacobi.compile` returns."""

from __future__ import annotations

import threading
import types
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._C import _functorch

from fxjacobi.compiler import specialise
from fxjacobi.errors import PlanError
from fxjacobi.methods.guess import describe_guess
from fxjacobi.plan import Plan
from fxjacobi.recorder import current_recorder
from fxjacobi.report import Report
from fxjacobi.saved_plan import Decision, SavedPlan, describe_method
from fxjacobi.settled_heap import settled_heap
from fxjacobi.signature import signature
from fxjacobi.trees import PRIMITIVES, without_values
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
_MAX_VALUES = 32  # signatures that differ in Python values alone; calls of further ones run the original
_MAX_PLAIN = 64  # signatures of calls that run the original by the short way
_BOOKS = ("_specialisations", "_plain", "_values", "_aside", "_last", "_lock")
"""What a copy starts without."""

_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _stand_aside() -> str | None:
    """Say why the original must run, if it must: somebody else looks at each operation."""
    if _functorch.peek_interpreter_stack() is not None:
        return "inside a transform of torch.func the original runs"
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        # It holds a fixed sequence of kernels; a solve learns its sweeps as it goes.
        return "inside a CUDA graph that is being captured the original runs"
    if torch._C._get_tracing_state() is not None:
        return "under torch.jit.trace the original runs"
    if torch._C._len_torch_dispatch_stack() and current_recorder() is not None:
        return "inside another compiled module's recording the original runs"
    if nn.modules.module._has_any_global_hook():
        # They would see the compiler's own modules in place of the model's.
        return "with hooks on all modules the original runs"
    if torch.is_grad_enabled() and _saved_tensors_hooks(True) is not None:
        # Checkpointing counts what is saved for the backward, which must be the same at every call.
        return "under hooks on saved tensors (torch.utils.checkpoint) the original runs"
    return None


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
        self._keep_books()
        if isinstance(model, nn.Module):
            self.training = model.training

    def _keep_books(self) -> None:
        self._specialisations: dict[Hashable, list[Specialisation]] = {}
        self._plain: dict[Hashable, Specialisation] = {}
        self._values: dict[Hashable, int] = {}
        self._aside: str | None = None
        self._last: Specialisation | None = None
        self._lock = threading.RLock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the original returns, and leave behind what it leaves."""
        # Past nn.Module's own __setattr__, which takes longer than all else that is done for a short call.
        state = self.__dict__
        state["_aside"] = aside = _stand_aside()
        if aside is not None:
            return self._original(*args, **kwargs)
        # Where nothing is gained, the original is always right: a key of shapes alone finds those calls.
        plain = self._plain_key(args) if not kwargs and self._plain else None
        short = self._plain.get(plain) if plain is not None else None
        if short is not None and short.still_plain():
            state["_last"] = short
            return self._original(*args)
        key, tensors = signature(args, kwargs)
        for specialisation in self._specialisations.get(key, ()):
            if specialisation.valid() and not specialisation.provisional:
                state["_last"] = specialisation
                if specialisation.module is None and not kwargs:
                    self._remember(args, specialisation)
                return specialisation(tensors, args, kwargs)
        if torch._C._len_torch_dispatch_stack():
            state["_aside"] = "inside another tracer the original runs, so that it sees all operations"
            return self._original(*args, **kwargs)
        with self._lock:
            if self._done_meanwhile(key):  # by another thread
                return self.forward(*args, **kwargs)
            refused = self._too_many(key)
            if refused is not None:
                state["_aside"] = refused
                return self._original(*args, **kwargs)
            with settled_heap():
                return self._compile(key, args, kwargs)

    def _compile(self, key: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
            specialisation.final = True
        known.append(specialisation)
        self.__dict__["_last"] = specialisation
        return result

    def _done_meanwhile(self, key: tuple[Any, ...]) -> bool:
        return any(s.valid() and not s.provisional for s in self._specialisations.get(key, ()))

    def _too_many(self, key: tuple[Any, ...]) -> str | None:
        """Say why calls of this signature are not compiled, if there were too many others."""
        if key in self._specialisations:
            return None
        loose = (without_values(key[0]), *key[1:])
        self._values[loose] = self._values.get(loose, 0) + 1
        if self._values[loose] > _MAX_VALUES:
            return (
                f"Python values among the arguments differed in {self._values[loose]} calls: pass what changes with each "
                "call as a tensor"
            )
        if len(self._specialisations) >= _MAX_SIGNATURES:
            return f"{_MAX_SIGNATURES} kinds of calls are compiled already"
        return None

    def _plain_key(self, args: tuple[Any, ...]) -> Hashable | None:
        """Shapes, dtypes and what else the choice of a specialisation depended on, if all arguments are tensors."""
        original = self.__dict__["_modules"].get("_original")
        key: list[Any] = [torch.is_grad_enabled(), original is not None and original.training]
        for argument in args:
            if type(argument) is not torch.Tensor:
                return None
            key += (argument.shape, argument.dtype, argument.requires_grad)
        return tuple(key)

    def _remember(self, args: tuple[Any, ...], specialisation: Specialisation) -> None:
        """Take the short way for calls like this one, for which the original runs."""
        shapes = self._plain_key(args)
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
        if self._aside is not None:
            return Report(False, self._aside)
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

    def __getstate__(self) -> dict[str, Any]:
        """What a copy (``copy.deepcopy``, ``torch.save``) takes along: it compiles anew."""
        return {name: value for name, value in self.__dict__.items() if name not in _BOOKS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call] # torch does not annotate it
        self._keep_books()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """A function that was compiled inside a class is a method of its instances."""
        return self if instance is None or isinstance(self._original, nn.Module) else types.MethodType(self, instance)

    def __setattr__(self, name: str, value: Any) -> None:
        """An attribute that is the original's is set there."""
        own = name.startswith("_") or name == "training" or name in self.__dict__ or hasattr(type(self), name)
        if not own and hasattr(self._original, name):
            setattr(self._original, name, value)
        else:
            super().__setattr__(name, value)

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
