"""Saving what planning measured and loading it, so that a server starts without measuring. JSON, nothing executable."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.errors import PlanError
from fxjacobi.loops import Loop
from fxjacobi.methods.guess import guess_of

if TYPE_CHECKING:
    from torch import fx

    from fxjacobi.methods.guess import Guess
    from fxjacobi.methods.method import Method

__all__ = ["Decision", "SavedPlan", "describe_method", "device_name", "fingerprint"]

_FORMAT = 1


def device_name() -> str:
    """What a plan's timings hold for: the processor, its threads, and the CUDA device where there is one."""
    name = f"{platform.machine()} cpu, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    return name


def fingerprint(module: fx.GraphModule) -> str:
    """A hash of the rolled graph: operations, arguments, specs and loops, without the values of parameters."""
    digest = hashlib.sha256()

    def describe(each: fx.GraphModule) -> None:
        for node in each.graph.nodes:
            target = node.target if isinstance(node.target, str) else torch.typename(node.target)
            if isinstance(node.target, torch._ops.OpOverload):
                target = str(node.target)
            digest.update(f"{node.op} {target} {node.args} {node.kwargs} {node.meta.get('spec')}\n".encode())
            if node.op == "call_module":
                child = each.get_submodule(str(node.target))
                if isinstance(child, Loop):
                    digest.update(f"{child.trip_count} {child.bindings} {child.results}\n".encode())
                    describe(child.body)

    describe(module)
    return digest.hexdigest()


@dataclass(frozen=True)
class Decision:
    """What was decided for one graph: whether it is solved, and each recurrence's method by the block's place."""

    solved: bool
    reason: str
    ordinary_s: float | None
    solved_s: float | None
    methods: tuple[dict[str, Any], ...] = ()

    def method(self, place: int) -> Method:
        """The method of the ``place``-th recurrence.

        Raises:
            PlanError: The plan names a method that does not exist, or options that it does not take.
        """
        from fxjacobi.choose import METHOD_OF_NAME  # choosing imports this module

        if place >= len(self.methods):
            raise PlanError("the saved plan has fewer recurrences than the graph")
        entry = self.methods[place]
        try:
            kind = METHOD_OF_NAME[entry["name"]]
            known = describe_method(kind())["options"]
            # Every option is a number or a bool: an integer is not written as 20.5, nor a bool as 1.
            odd = [o for o, v in entry["options"].items() if type(v) not in {type(known[o]), int} or
                   isinstance(known[o], bool) is not isinstance(v, bool)]  # fmt: skip
            method: Method | None = None if odd else kind(**entry["options"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the saved plan names a method that this version does not have: {entry}") from error
        if method is None:
            raise PlanError(f"the saved plan is damaged: {', '.join(odd)} in {entry}")
        return method


@dataclass
class SavedPlan:
    """Decisions by the graph's fingerprint, and what they hold for."""

    torch: str = torch.__version__
    device: str = field(default_factory=device_name)
    rtol: float = 0.0
    atol: float = 0.0
    warm_start: bool = False
    guess: dict[str, Any] | None = None
    decisions: dict[str, Decision] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        content = {"format": _FORMAT, **dataclasses.asdict(self)}
        Path(path).write_text(json.dumps(content, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> SavedPlan:
        """Read a plan.

        Raises:
            PlanError: It is no plan of this format, or it was measured on another device or torch build.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PlanError(f"{path} cannot be read as a plan: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise PlanError(f"{path} is no plan of format {_FORMAT}")
        for name, here in (("torch", torch.__version__), ("device", device_name())):
            if content.get(name) != here:
                raise PlanError(f"{path} was measured with {name} {content.get(name)!r}; this is {here!r}")
        try:
            decisions = {
                key: Decision(**{**entry, "methods": tuple(entry["methods"])})
                for key, entry in content["decisions"].items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{path} is damaged: {error}") from error
        _check_types(path, content, decisions)
        named = {name: content[name] for name in ("rtol", "atol", "warm_start", "guess") if name in content}
        return cls(content["torch"], content["device"], decisions=decisions, **named)

    def start(self, guess: Guess | None) -> Guess | None:
        """Where solves start: ``guess`` if the caller has one, else the plan's.

        Raises:
            PlanError: The plan's guess was a function or a trajectory, which a plan does not hold, or is unknown.
        """
        if guess is not None or self.guess is None:
            return guess
        try:
            saved = guess_of(self.guess)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"the saved plan names a guess that this version does not have: {self.guess}") from error
        if saved is None:
            raise PlanError(f"the saved plan was measured with guess={self.guess['name']}(...), which JSON does not "
                            "hold; pass it again")  # fmt: skip
        return saved

    def decision(self, graph: str) -> Decision:
        """The decision for a graph.

        Raises:
            PlanError: The plan was made for other graphs.
        """
        if graph not in self.decisions:
            raise PlanError("the saved plan was made for another graph; compile without plan= and save it again")
        return self.decisions[graph]


def _check_types(path: str | Path, content: dict[str, Any], decisions: dict[str, Decision]) -> None:
    """Raise :class:`PlanError` unless each value has the type that :meth:`SavedPlan.save` writes."""

    def check(name: str, value: Any, *kinds: type) -> None:
        if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
            raise PlanError(f"{path} is damaged: {name} is {value!r}")

    for name, kinds in (("rtol", (float, int)), ("atol", (float, int)), ("warm_start", (bool,)),
                        ("guess", (dict, type(None)))):  # fmt: skip
        if name in content:
            check(name, content[name], *kinds)
    for decision in decisions.values():
        check("solved", decision.solved, bool)
        check("reason", decision.reason, str)
        for name in ("ordinary_s", "solved_s"):
            check(name, getattr(decision, name), float, int, type(None))
        for method in decision.methods:
            check("a method", method, dict)
            check("a method's name", method.get("name"), str)
            check("a method's options", method.get("options"), dict)


def _fields(method: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(method)


def describe_method(method: Method) -> dict[str, Any]:
    """A method as JSON: its name and its options."""
    from fxjacobi.choose import METHOD_OF_NAME

    name = next(name for name, kind in METHOD_OF_NAME.items() if type(method) is kind)
    return {"name": name, "options": {f.name: getattr(method, f.name) for f in _fields(method)}}
