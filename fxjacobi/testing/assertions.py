"""Assertions of the exactness contract: equal outputs, equal effects, equal random state."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxjacobi.bits import first_difference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

__all__ = ["Outcome", "assert_equal_bits", "assert_equivalent", "run"]


def assert_equal_bits(got: Any, want: Any, *, name: str = "output", block: str | None = None) -> None:
    """Raise ``AssertionError`` unless ``got`` equals ``want`` in structure, dtype, shape, device and every element.

    Elements are compared by IEEE ``==``; NaN matches NaN, and either zero matches the other. Tuples, lists, dicts and
    dataclasses are walked; what is no tensor must have the same type and be equal.

    Args:
        got: The value to judge.
        want: The ordinary run's value.
        name: What to call the value in the message.
        block: Name of the block of the plan that computed it, for the message.
    """
    __tracebackhide__ = True
    for path, problem in _differences(got, want, name):
        where = f"{path} (block {block})" if block else path
        raise AssertionError(f"{where}: {problem}")


def _differences(got: Any, want: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path, what is wrong) of every leaf that differs."""
    if type(got) is not type(want):
        yield path, f"is a {type(got).__name__}, expected a {type(want).__name__}"
    elif isinstance(want, torch.Tensor):
        difference = first_difference(got, want)
        if difference is not None:
            yield path, str(difference)
        elif got.requires_grad != want.requires_grad:
            yield path, f"requires_grad is {got.requires_grad}, expected {want.requires_grad}"
    elif dataclasses.is_dataclass(want):
        for field in dataclasses.fields(want):
            yield from _differences(getattr(got, field.name), getattr(want, field.name), f"{path}.{field.name}")
    elif isinstance(want, dict):
        if list(got) != list(want):
            yield path, f"has the keys {list(got)}, expected {list(want)}"
        else:
            for key in want:
                yield from _differences(got[key], want[key], f"{path}[{key!r}]")
    elif isinstance(want, (tuple, list)):
        if len(got) != len(want):
            yield path, f"has {len(got)} items, expected {len(want)}"
        else:
            for index, (left, right) in enumerate(zip(got, want, strict=True)):
                yield from _differences(left, right, f"{path}[{index}]")
    elif repr(got) != repr(want) and not bool(got == want):
        # The representations decide for NaN, which is not equal to itself.
        yield path, f"is {got!r}, expected {want!r}"


@dataclass(frozen=True)
class Outcome:
    """What a run of a model did, in full.

    Args:
        result: What it returned, or ``None`` if it raised.
        error: What it raised, or ``None``.
        arguments: Its arguments after the run.
        state: Every tensor and plain value that the model's submodules hold after the run, by qualified name.
        random_state: State of the generators after the run.
    """

    result: Any
    error: Exception | None
    arguments: tuple[Any, ...]
    state: Mapping[str, Any]
    random_state: tuple[torch.Tensor, ...]


def run(model: Callable[..., Any], arguments: tuple[Any, ...], *, seed: int, owner: nn.Module | None) -> Outcome:
    """Call ``model(*arguments)`` from ``seed`` and return everything that came of it.

    Args:
        model: What to call.
        arguments: Its arguments; the run may write to them.
        seed: Seed of the random generators.
        owner: The module whose state to look at afterwards, if any.
    """
    torch.manual_seed(seed)
    result, error = None, None
    try:
        result = model(*arguments)
    except Exception as raised:  # noqa: BLE001 - the user's own exception is an outcome; it is compared
        error = raised
    state = {name: _copy(value) for name, (_, _, value) in _slots(owner).items()}
    return Outcome(result, error, arguments, state, _random_state())


def assert_equivalent(
    compiled: Callable[..., Any],
    original: Callable[..., Any],
    make_args: Callable[[], tuple[Any, ...]],
    *,
    seed: int = 0,
    gradients: float | None = None,
) -> None:
    """Raise ``AssertionError`` unless one call of ``compiled`` does exactly what one call of ``original`` does.

    Both run from the same seed, on equal arguments, and from the same state of the model; ``original`` goes first. The
    following must agree: outputs, exceptions, arguments afterwards (in-place writes), the state of the model's modules
    afterwards (parameters, buffers, and tensors or plain values in attributes), which outputs share memory with which
    arguments and with one another, and the random generators' state. If ``original`` is no module, no state is watched.

    Args:
        compiled: What to judge, for instance ``fxjacobi.compile(original)``.
        original: The ordinary module or function. When it is a module, ``compiled`` may share its parameters.
        make_args: Makes the positional arguments; called once.
        seed: Seed of both runs.
        gradients: Compare also the gradients of the sum of all differentiable outputs, with this relative and absolute
            tolerance: a batched map sums a weight's gradient in another order than a loop does. A program that cannot
            be differentiated in the ordinary run (it overwrote what backward needs) has no gradients to compare.
    """
    __tracebackhide__ = True
    arguments = make_args()
    owner = original if isinstance(original, nn.Module) else None
    before = _Snapshot(owner)
    # One deepcopy, so that arguments which share memory still do.
    want = run(original, copy.deepcopy(arguments), seed=seed, owner=owner)
    want_gradients = _gradients(want, owner) if gradients is not None else None
    before.restore()
    got = run(compiled, copy.deepcopy(arguments), seed=seed, owner=owner)

    if want.error is not None or got.error is not None:
        if type(got.error) is not type(want.error) or str(got.error) != str(want.error):
            raise AssertionError(f"raised {got.error!r}, expected {want.error!r}") from got.error
    else:
        assert_equal_bits(got.result, want.result)
        assert_equal_bits(
            _sharing(got), _sharing(want), name="memory shared by the output's and the arguments' tensors"
        )
    assert_equal_bits(got.arguments, want.arguments, name="arguments after the call")
    assert_equal_bits(got.state, want.state, name="state after the call")
    assert_equal_bits(got.random_state, want.random_state, name="random state after the call")
    if gradients is not None and want_gradients is not None:
        found = _gradients(got, owner)
        torch.testing.assert_close(found, want_gradients, rtol=gradients, atol=gradients, equal_nan=True)


class _Snapshot:
    """The state of a module, to be put back by :meth:`restore`: the same objects, with the values they had."""

    def __init__(self, owner: nn.Module | None) -> None:
        self.owner = owner
        self.objects = {key: value for key, (_, _, value) in _slots(owner).items()}
        self.values = {key: _copy(value) for key, value in self.objects.items()}

    def restore(self) -> None:
        for key, (slot, name, _) in _slots(self.owner).items():
            if key not in self.objects:
                del slot[name]
                continue
            slot[name] = self.objects[key]
            _write_back(slot[name], self.values[key])


def _write_back(now: Any, value: Any) -> None:
    """Give the mutable object ``now`` the contents that it had when it was copied as ``value``."""
    if isinstance(now, torch.Tensor):
        if now.requires_grad and not value.requires_grad:
            now.detach_()  # a run in grad mode tied it to its graph
        if first_difference(now, value) is not None:
            with torch.no_grad():
                now.copy_(value)
    elif isinstance(now, list):
        now[:] = value
    elif isinstance(now, dict):
        now.clear()
        now.update(value)


def _slots(owner: nn.Module | None) -> dict[str, tuple[dict[str, Any], str, Any]]:
    """Return every tensor and plain value that ``owner``'s modules keep: qualified name -> (dict, key, value)."""
    found: dict[str, tuple[dict[str, Any], str, Any]] = {}
    for prefix, module in owner.named_modules() if owner is not None else ():
        own = vars(module)
        for slot in (own, own["_parameters"], own["_buffers"]):
            for name, value in slot.items():
                # What starts with an underscore in the module's own dict are nn.Module's registries and hooks.
                if (slot is not own or not name.startswith("_")) and _plain(value):
                    found[f"{prefix}.{name}" if prefix else name] = (slot, name, value)
    return found


_PLAIN = (bool, int, float, complex, str, type(None))


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_plain(item) for item in value.values())
    return isinstance(value, (torch.Tensor, *_PLAIN))


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (tuple, list)) and _plain(value):
        return type(value)(_copy(item) for item in value)
    if isinstance(value, dict) and _plain(value):
        return {key: _copy(item) for key, item in value.items()}
    return value


def _random_state() -> tuple[torch.Tensor, ...]:
    return (torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ()))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _sharing(outcome: Outcome) -> list[int]:
    """Return, for each tensor with elements of the result and the arguments, the first one with which it shares memory."""
    first: dict[int, int] = {}
    tensors = [tensor for tensor in _tensors((outcome.result, outcome.arguments)) if tensor.numel()]
    return [first.setdefault(tensor.untyped_storage().data_ptr(), place) for place, tensor in enumerate(tensors)]


def _gradients(outcome: Outcome, owner: nn.Module | None) -> dict[str, torch.Tensor] | None:
    """Return the gradients of the sum of the outcome's differentiable tensors, by name of argument or parameter.

    ``None`` where autograd refuses: the program wrote over a value that its own backward pass reads.
    """
    roots = [tensor for tensor in _tensors(outcome.result) if tensor.requires_grad]
    leaves = {f"argument {i}": t for i, t in enumerate(_tensors(outcome.arguments)) if t.is_leaf and t.requires_grad}
    leaves |= dict(owner.named_parameters()) if owner is not None else {}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if not roots or not wanted:
        return {}
    ones = [torch.ones_like(root) for root in roots]
    try:
        found = torch.autograd.grad(roots, list(wanted.values()), ones, allow_unused=True, materialize_grads=True)
    except RuntimeError as refusal:
        if "modified by an inplace operation" not in str(refusal):
            raise
        return None
    return dict(zip(wanted, found, strict=True))
