from __future__ import annotations

import gc

import pytest
import torch

from fxjacobi.timing import interleaved, once, started


def test_once_returns_the_result_and_positive_seconds() -> None:
    result, seconds = once(lambda: 7)
    assert result == 7
    assert seconds > 0


def test_functions_take_turns_in_both_orders() -> None:
    calls: list[str] = []
    medians = interleaved([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert len(medians) == 2
    assert all(median > 0 for median in medians)
    assert gc.isenabled()


def test_short_functions_are_called_many_times_in_a_sample() -> None:
    calls: list[int] = []
    interleaved([lambda: calls.append(1)], rounds=2, sample_s=0.01, warmup=0)
    assert len(calls) > 20


def test_garbage_collection_is_on_again_after_an_error() -> None:
    count = [0]

    def fails() -> None:
        count[0] += 1
        if count[0] > 1:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        interleaved([fails], rounds=2)
    assert gc.isenabled()


def test_rounds_must_be_positive() -> None:
    with pytest.raises(ValueError, match="rounds"):
        interleaved([lambda: None], rounds=0)


class FakeEvent:
    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: FakeEvent) -> float:
        assert other is not self
        return 2500.0


@pytest.mark.parametrize(("reserved", "by_events"), [([1, 0], True), ([1, 1], False), ([0, 1], False)])
def test_the_clock_is_the_devices_own_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, reserved: list[int], by_events: bool
) -> None:
    waited: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", reserved.__getitem__)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    seconds = started()()
    assert (seconds == 2.5) == by_events
    used = [device for device, bytes_ in enumerate(reserved) if bytes_]
    assert waited == used * (1 if by_events else 2)  # before, and where events do not, after
