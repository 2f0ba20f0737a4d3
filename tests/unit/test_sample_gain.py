"""What leaving final samples out may gain: when it is tried, and when it is done."""

from __future__ import annotations

import pytest

from fxjacobi.sample_gain import SampleGain

TOGETHER = (100, 100, 100, 100, 100, 0)
APART = (100, 20, 10, 10, 10, 0)


def calls_before_a_trial(changed: tuple[int, ...], build_s: float) -> int:
    gain = SampleGain(100, 52, build_s)
    for call in range(1000):
        if any(gain.worth_trying(changed[:sweep], 1.0) for sweep in range(1, len(changed) + 1)):
            return call
        gain.record(changed, 1.0)
    return 1000


def test_samples_that_end_together_are_never_tried() -> None:
    assert calls_before_a_trial(TOGETHER, 0.0) == 1000
    assert calls_before_a_trial((100, 100, 100, 50, 0), 0.0) == 1000  # half of a sweep, and one more to confirm


@pytest.mark.parametrize("build_s", [0.0, 10.0, 100.0])
def test_a_trial_costs_no_more_than_was_forgone(build_s: float) -> None:
    # Of each solve at most 0.8 + 0.9 + 0.9 + 0.9 sweeps less one to confirm could have been saved.
    calls = calls_before_a_trial(APART, build_s)
    assert calls * 2.5 <= build_s + 2.0 <= calls * 2.5 + 3.5


def test_a_long_solve_is_tried_in() -> None:
    gain = SampleGain(100, 52, 10.0)
    assert gain.worth_trying([100] + [10] * 40, 1.0)
    assert not gain.worth_trying([100] + [60] * 40, 1.0)


@pytest.mark.parametrize(("left", "confirmed", "worth"), [
    (None, True, True), (1, True, False), (2, True, False), (3, True, True), (1, False, True), (0, False, False),
])  # fmt: skip
def test_it_is_done_where_enough_sweeps_are_left(left: int | None, confirmed: bool, worth: bool) -> None:
    gain = SampleGain(100, 52, 0.0)
    gain.whole_s, gain.part_s = 2.0, 1.0
    assert gain.worth_using(left, confirmed=confirmed) is worth
