"""What a run does past the dispatcher: it is refused with its line, in the thread that records and in no other."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

import fxjacobi
from fxjacobi.capture import record
from fxjacobi.outline import Outliner
from fxjacobi.recorder import Recorder
from fxjacobi.unseen import watched

if TYPE_CHECKING:
    from collections.abc import Callable

_generator = torch.Generator()
_state = torch.get_rng_state()


def _seeds(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return x + torch.randn(4)


def _forks(x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng():
        return x + torch.randn(4)


def _sets_the_state(x: torch.Tensor) -> torch.Tensor:
    torch.set_rng_state(_state)
    return x + torch.randn(4)


def _seeds_at_random(x: torch.Tensor) -> torch.Tensor:
    torch.seed()
    return x


def _seeds_a_generator(x: torch.Tensor) -> torch.Tensor:
    _generator.manual_seed(0)
    return x + torch.randn(4, generator=_generator)


def _seeds_python(x: torch.Tensor) -> torch.Tensor:
    random.seed(0)
    return x * random.random()


def _seeds_numpy(x: torch.Tensor) -> torch.Tensor:
    np.random.seed(0)
    return x * float(np.random.rand())


def _reads_the_seed(x: torch.Tensor) -> torch.Tensor:
    return x + torch.initial_seed()


def _requires_gradients(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (_seeds, "manual_seed sets a random generator"),
        (_forks, "fork_rng sets a random generator"),
        (_sets_the_state, "set_state sets a random generator"),
        (_seeds_at_random, "seed sets a random generator"),
        (_seeds_a_generator, "manual_seed sets a random generator"),
        (_seeds_python, "random.seed sets a random generator"),
        (_seeds_numpy, "random.seed sets a random generator"),
        (_reads_the_seed, "initial_seed reads a random generator's seed"),
        (_requires_gradients, "requires_grad_ decides inside the run what has gradients"),
    ],
)
def test_what_the_dispatcher_does_not_see_is_refused_with_its_line(fn: Callable[..., Any], said: str) -> None:
    failure = record(fn, (torch.ones(4),), {}).failure
    assert failure is not None
    assert said in str(failure)
    assert failure.site is not None
    assert "test_unseen.py:" in failure.site
    assert failure.remedy


@pytest.mark.parametrize("fn", [_seeds, _forks, _sets_the_state, _seeds_a_generator])
def test_what_seeds_itself_gives_the_same_samples_and_leaves_the_same_state(fn: Callable[..., Any]) -> None:
    compiled = fxjacobi.compile(fn, measure=False)
    x = torch.ones(4)
    torch.manual_seed(0)
    _generator.manual_seed(0)
    with pytest.warns(fxjacobi.CaptureWarning, match="sets a random generator"):
        compiled(x)
    for seed in (1, 2):
        torch.manual_seed(seed)
        found, left = compiled(x), torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(found, fn(x))
        assert torch.equal(left, torch.get_rng_state())


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook", "retain_grad"])
def test_what_hangs_on_a_gradient_is_refused_where_there_are_gradients(hook: str) -> None:
    def hangs(x: torch.Tensor) -> torch.Tensor:
        y = x if hook == "register_post_accumulate_grad_hook" else x * 2
        if y.requires_grad:
            getattr(y, hook)(*[lambda *_: None] * (hook != "retain_grad"))
        return y * 3

    assert record(hangs, (torch.ones(4),), {}).failure is None
    failure = record(hangs, (torch.ones(4, requires_grad=True),), {}).failure
    assert f"Tensor.{hook} hangs something on a gradient" in str(failure)


def test_nodes_of_the_graph_of_gradients_are_refused_where_there_are_gradients() -> None:
    def hangs(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if y.grad_fn is not None:
            y.grad_fn.register_hook(lambda inputs, outputs: inputs)
        return y * 3

    assert record(hangs, (torch.ones(4),), {}).failure is None
    failure = record(hangs, (torch.ones(4, requires_grad=True),), {}).failure
    assert "Tensor.grad_fn hands out a node" in str(failure)
    assert "test_unseen.py:" in str(failure)


def test_hooks_of_the_run_still_act() -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(x)
        y.register_hook(lambda g: 2 * g)
        for _ in range(20):
            y = torch.tanh(y * 0.5)
        return y

    compiled = fxjacobi.compile(doubled, measure=False)
    x = torch.ones(4, requires_grad=True)
    with pytest.warns(fxjacobi.CaptureWarning, match="hangs something on a gradient"):
        compiled(x)
    (found,) = torch.autograd.grad(compiled(x).sum(), x)
    (wanted,) = torch.autograd.grad(doubled(x).sum(), x)
    assert torch.equal(found, wanted)


def test_other_threads_read_memory_and_call_modules_as_they_like() -> None:
    net = nn.Linear(4, 4)

    def meanwhile() -> None:
        torch.ones(3).numpy()
        torch.ones(3).tolist()
        torch.manual_seed(0)
        net(torch.ones(4))

    def run(x: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=meanwhile)
        thread.start()
        thread.join()
        return x * 2

    recorded = record(run, (torch.ones(4),), {})
    assert recorded.failure is None
    assert recorded.capture is not None
    assert recorded.capture.operations == 1


def test_recordings_of_two_threads_that_overlap_leave_nothing_replaced() -> None:
    call, read, one_hot = nn.Module.__call__, torch.Tensor.numpy, nn.functional.one_hot
    methods = dict(vars(torch.Generator))
    started, ended = threading.Event(), threading.Event()

    def first() -> None:
        def run(x: torch.Tensor) -> torch.Tensor:
            started.set()
            ended.wait(10)
            return x

        record(run, (torch.ones(4),), {})

    thread = threading.Thread(target=first)
    thread.start()
    started.wait(10)

    def run(x: torch.Tensor) -> torch.Tensor:
        ended.set()
        thread.join()  # the recording that began first ends first
        assert nn.Module.__call__ is not call
        x.numpy()
        return x

    assert "numpy reads" in str(record(run, (torch.ones(4),), {}).failure)
    assert nn.Module.__call__ is call
    assert torch.Tensor.numpy is read
    assert nn.functional.one_hot is one_hot
    assert dict(vars(torch.Generator)) == methods


def test_the_innermost_recording_of_a_thread_is_told() -> None:
    recorders = [Recorder(torch.fx.Graph(), lambda value, name: name, {}, False, nn.Module()) for _ in range(2)]
    with watched(recorders[0], Outliner(recorders[0])):
        with watched(recorders[1], Outliner(recorders[1])):
            torch.ones(1).numpy()
        assert recorders[1].failure is not None
        assert recorders[0].failure is None
        torch.ones(1).numpy()
        assert recorders[0].failure is not None
