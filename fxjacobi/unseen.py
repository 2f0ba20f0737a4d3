"""Watching, while a run is recorded, what Python does past the dispatcher.

Methods of classes are replaced for that time: those by which Python reads a tensor's memory, hangs something on a
gradient or seeds a generator, and the call of a submodule; ``one_hot`` too. These belong to all threads, so a
replacement asks for a recording of its own thread; the first recording puts the replacements in, and the last one takes
them out.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fxjacobi.one_hot import one_hot_by_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fxjacobi.outline import Outliner
    from fxjacobi.recorder import Recorder

__all__ = ["watched"]

_READS = ("numpy", "__array__", "data_ptr", "__dlpack__", "storage", "untyped_storage")
_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
_SEEDS = ("manual_seed", "seed", "set_state", "graphsafe_set_state", "set_offset")
_SEEDS_READ = ("initial_seed", "get_offset")

_READ = ("reads a tensor's memory outside torch", "keep the computation in torch")
_REQUIRED = ("decides inside the run what has gradients", "call it on the tensors before the call")
_HUNG = (
    "hangs something on a gradient, which a graph does not hold",
    "call it on what the compiled function takes or returns, outside it",
)
_NODE = (
    "hands out a node of the run's own graph of gradients, on which hooks may hang",
    "hang hooks on what the compiled function takes or returns, outside it",
)
_SEEDED = ("sets a random generator inside the run", "seed before the call, or pass a generator that is seeded outside")
_SEED_READ = ("reads a random generator's seed inside the run", "pass the seed as an argument")
_SEEDED_PYTHON = (_SEEDED[0], "seed before the call, and draw with torch")

_lock = threading.Lock()
_recordings: dict[int, list[tuple[Recorder, Outliner]]] = {}  # by thread, the innermost last
_undo: list[Callable[[], None]] = []


@contextlib.contextmanager
def watched(recorder: Recorder, outliner: Outliner) -> Iterator[None]:
    """Inside, ``recorder`` and ``outliner`` are told what this thread does past the dispatcher."""
    thread = threading.get_ident()
    with _lock:
        if not _recordings:
            _replace_all()
        _recordings.setdefault(thread, []).append((recorder, outliner))
    try:
        yield
    finally:
        with _lock:
            _recordings[thread].pop()
            if not _recordings[thread]:
                del _recordings[thread]
            while not _recordings and _undo:
                _undo.pop()()


def _here() -> tuple[Recorder, Outliner] | None:
    """The recording that this thread is in."""
    recordings = _recordings.get(threading.get_ident())
    return recordings[-1] if recordings else None


def _replace_all() -> None:
    call, to_list, one_hot = nn.Module.__call__, torch.Tensor.tolist, functional.one_hot
    ranged_one_hot = one_hot_by_range(one_hot)
    read_grad_fn = vars(torch._C.TensorBase)["grad_fn"].__get__

    def recorded_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        here = _here()
        return call(module, *args, **kwargs) if here is None else here[1].call(call, module, args, kwargs)

    def seen_list(tensor: torch.Tensor) -> Any:
        value = to_list(tensor)
        here = _here()
        if here is not None:
            here[0].saw(tensor, value)
        return value

    def recorded_one_hot(tensor: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
        return (one_hot if _here() is None else ranged_one_hot)(tensor, num_classes)

    def grad_fn(tensor: torch.Tensor) -> Any:
        node = read_grad_fn(tensor)
        return node if node is None else read_node(node)

    _replace(nn.Module, "__call__", recorded_call)
    _replace(torch.Tensor, "tolist", seen_list)
    _replace(functional, "one_hot", recorded_one_hot)
    for name in _READS:
        _replace(torch.Tensor, name, _refusing(f"Tensor.{name}", getattr(torch.Tensor, name), _READ))
    _replace(torch.Tensor, "requires_grad_", _refusing("Tensor.requires_grad_", torch.Tensor.requires_grad_, _REQUIRED))
    for name in _HOOKS:
        hung = _refusing(f"Tensor.{name}", getattr(torch.Tensor, name), _HUNG, lambda recorder: recorder.gradients)
        _replace(torch.Tensor, name, hung)
    read_node = _refusing("Tensor.grad_fn", lambda node: node, _NODE, lambda recorder: recorder.gradients)
    _replace(torch.Tensor, "grad_fn", property(grad_fn))
    # It sets a state back as well, but as it ends, from a line of contextlib's.
    _replace(torch.random, "fork_rng", _refusing("torch.random.fork_rng", torch.random.fork_rng, _SEEDED))
    _replace_in_generators()
    for module, name in ((random, "seed"), (random, "setstate"), (np.random, "seed"), (np.random, "set_state")):
        _replace(module, name, _refusing(f"{module.__name__}.{name}", getattr(module, name), _SEEDED_PYTHON))


def _refusing(
    what: str,
    original: Callable[..., Any],
    why: tuple[str, str],
    counts: Callable[[Recorder], bool] | None = None,
) -> Callable[..., Any]:
    """``original``, which a recording cannot hold, at least one that it ``counts`` for."""
    message, remedy = f"{what} {why[0]}", why[1]

    def method(*args: Any, **kwargs: Any) -> Any:
        here = _here()
        if here is not None and (counts is None or counts(here[0])):
            here[0].cannot_record(message, remedy)
        return original(*args, **kwargs)

    return method


def _replace(owner: Any, name: str, method: Any) -> None:
    own = vars(owner).get(name)
    setattr(owner, name, method)
    _undo.append(lambda: delattr(owner, name) if own is None else setattr(owner, name, own))


def _replace_in_generators() -> None:
    """Every way to seed a generator ends in a method of its class, which is C's and takes no assignment."""
    kind = torch._C.Generator
    methods = gc.get_referents(vars(kind))[0]  # what the read-only view that a class shows of its dictionary is of
    if not isinstance(methods, dict):
        return
    kept = {name: methods[name] for name in (*_SEEDS, *_SEEDS_READ) if name in methods}

    def put(functions: dict[str, Any]) -> None:
        methods.update(functions)
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(kind))  # forget the methods that were looked up before

    put({
        name: _refusing(f"Generator.{name}", method, _SEEDED if name in _SEEDS else _SEED_READ)
        for name, method in kept.items()
    })  # fmt: skip
    _undo.append(lambda: put(kept))
