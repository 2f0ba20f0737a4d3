"""Timing in turn, shares of time, rows of ways that were measured together."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from fxjacobi.bench import DEVICE_SUITE, EVERYTHING, SUITE, Row, Settings
from fxjacobi.bench.clock import Share, medians
from fxjacobi.bench.contest import Contest, rows_within

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")


def sleeping(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def test_functions_take_turns_and_the_first_round_is_always_run() -> None:
    calls: list[str] = []
    functions = [lambda: calls.append("a"), lambda: calls.append("b")]
    medians(functions, device=CPU, rounds=3)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b"]
    calls.clear()
    medians(functions, device=CPU, rounds=5, budget_s=0.0, warmup=0)
    assert calls == ["a", "b"]
    with pytest.raises(ValueError, match="rounds"):
        medians(functions, device=CPU, rounds=0)


def test_the_first_call_of_a_turn_is_not_counted_where_there_is_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def cold_every_seventh_time() -> None:
        nonlocal now, calls
        now += 5.0 if calls % 7 else 30.0
        calls += 1

    monkeypatch.setattr("fxjacobi.bench.clock.time", SimpleNamespace(perf_counter=lambda: now))
    assert medians([cold_every_seventh_time], device=CPU, rounds=3, warmup=0, turn_s=62.0) == [5.0]
    assert calls == 3 * 7  # 60 s each, and another call would take 5 at least
    assert medians([cold_every_seventh_time], device=CPU, rounds=1, warmup=0, turn_s=35.0) == [30.0]
    assert calls == 3 * 7 + 1


def test_a_row_holds_every_way_and_its_ratio() -> None:
    contest = Contest("case", sleeping(0.004), {"sweeps": 3})
    contest.enter("solved", sleeping(0.001), first_s=2.0)
    contest.enter("graphed", time.sleep, 0.002)
    contest.enter("slow", sleeping(0.003))
    contest.enter("closed", None, refusal="not here")
    contest.slow.add("slow")
    values = contest.row(Settings(rounds=3), budget_s=1.0).values
    assert values["closed_refused"] == "not here"
    assert values["solved_first_s"] == 2.0
    assert values["sweeps"] == 3
    assert float(values["ratio"]) == float(values["eager_s"]) / float(values["solved_s"])
    assert float(values["ratio_to_graphed"]) == float(values["graphed_s"]) / float(values["solved_s"])
    assert float(values["slow_s"]) >= 0.003
    assert "ratio_to_closed" not in values
    given = contest.row(Settings(rounds=1), budget_s=1.0, ordinary_s=10.0).values
    assert given["eager_s"] == 10.0


def test_what_does_not_fit_into_a_share_is_named() -> None:
    def measure(share: Share) -> Row:
        assert share.left() > 0
        time.sleep(0.03)
        return Row("measured", {"eager_s": 1.0})

    cases = [("long", 4.0, measure), ("longer", 40.0, measure), ("short", 1.0, measure)]
    rows = list(rows_within(0.1, cases))
    assert [("not_measured" in row.values) for row in rows] == [False, True, False]
    assert rows[1].case == "longer"
    assert "0.1 s" in str(rows[1].values["not_measured"])


def test_a_case_that_fails_is_named_and_the_others_go_on() -> None:
    def wrong(_: Share) -> Row:
        raise AssertionError("output differs\nat element 3")

    rows = list(rows_within(9.0, [("wrong", 1.0, wrong), ("right", 1.0, lambda _: Row("right", {"eager_s": 1.0}))]))
    assert rows[0].values["failed"] == rows[0].values["not_measured"] == "AssertionError: output differs"
    assert rows[1].case == "right"


def test_the_device_pieces_together_take_less_than_nine_minutes() -> None:
    assert sum(float(vars(type(piece))["share_s"]) for piece in DEVICE_SUITE) < 9 * 60
    names = [benchmark.name for benchmark in EVERYTHING]
    assert len(set(names)) == len(names)
    assert {piece.name for piece in (*SUITE, *DEVICE_SUITE)} < set(names)
    assert all(piece.cases() for piece in DEVICE_SUITE), "a piece that was not measured must say which rows it lacks"
