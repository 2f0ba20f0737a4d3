from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

import fxjacobi
from fxjacobi.bench import Benchmark, Row, Settings, run
from fxjacobi.bench.capture_cost import CaptureCost, GRULoop
from fxjacobi.bench.overhead import models
from fxjacobi.bench.runner import shown
from fxjacobi.testing import assert_equal_bits

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Two(Benchmark):
    name = "two"
    summary = "two rows"

    def rows(self, settings: Settings) -> Iterator[Row]:
        yield Row("first", {"ordinary_s": 1.5, "sweeps": 3, "equal": True})
        yield Row("second", {"ordinary_s": 2e-5, "ratio": 123.4, "equal": True})


class Unequal(Two):
    name = "unequal"

    def rows(self, settings: Settings) -> Iterator[Row]:
        yield Row("first", {"ordinary_s": 1.0})
        assert_equal_bits(torch.ones(1), torch.zeros(1))


def test_rows_are_printed_and_written(tmp_path: Path) -> None:
    out = io.StringIO()
    results = run([Two()], Settings(), json_file=tmp_path / "b.json", console=Console(file=out, width=120))
    assert [row.case for row in results["two"]] == ["first", "second"]
    text = out.getvalue()
    for part in ("two: two rows", "1.5 s", "20 us", "123", "yes", "torch", "threads 1"):
        assert part in text
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["benchmarks"]["two"][0] == {"case": "first", "ordinary_s": 1.5, "sweeps": 3, "equal": True}
    assert written["environment"]["torch"] == torch.__version__


def test_a_result_that_is_not_equal_has_no_speed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="differ"):
        run([Two(), Unequal()], Settings(), json_file=tmp_path / "b.json", console=Console(file=io.StringIO()))
    assert list(json.loads((tmp_path / "b.json").read_text())["benchmarks"]) == ["two"]


class Named(Two):
    name = "named"

    def rows(self, settings: Settings) -> Iterator[Row]:
        yield Row("wrong", {"not_measured": "it differs", "failed": "it differs"})


def test_what_fails_does_not_keep_the_others_from_running(tmp_path: Path) -> None:
    out = io.StringIO()
    with pytest.raises(ExceptionGroup) as failed:
        run(
            [Unequal(), Named(), Two()], Settings(), json_file=tmp_path / "b.json", console=Console(file=out, width=120)
        )
    assert [type(each) for each in failed.value.exceptions] == [AssertionError, AssertionError]
    assert "named: wrong: it differs" in str(failed.value.exceptions[1])
    assert "unequal: failed after" in out.getvalue()
    written = json.loads((tmp_path / "b.json").read_text())
    assert list(written["benchmarks"]) == ["named", "two"]
    assert list(written["unfinished"]) == ["unequal"]


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("a_s", 12.345, "12.3 s"),
        ("a_s", 0.0123, "12.3 ms"),
        ("a_us", 7.0, "7 us"),
        ("a_us", 2500.0, "2.5 ms"),
        ("a_us", -3.0, "-3 us"),
        ("ratio", 1.0512, "1.05"),
        ("ratio", 1234.5, "1234"),
        ("n", 784, "784"),
        ("equal", False, "no"),
        ("note", "text", "text"),
    ],
)
def test_numbers_are_shown_in_a_fitting_unit(column: str, value: float | str | bool, text: str) -> None:
    assert shown(column, value) == text


@pytest.mark.parametrize("case", list(models()))
def test_the_overhead_table_compares_equal_results(case: str) -> None:
    model, arguments = models()[case]
    compiled = fxjacobi.compile(model.eval())
    with torch.no_grad():
        for _ in range(2):
            assert_equal_bits(compiled(*arguments), model(*arguments))


def test_the_capture_table_has_rows_of_first_calls_and_of_recording_alone() -> None:
    rows = list(CaptureCost().rows(Settings(quick=True)))
    assert [row.case for row in rows] == ["T=16", "recording alone, 64 operations"]
    assert all(row.values["equal"] and row.values["first_call_s"] > row.values["ordinary_s"] for row in rows)  # type: ignore[operator]


def test_the_loop_of_the_capture_table_is_a_gru() -> None:
    model, x = GRULoop(4), torch.randn(5, 2, 4)
    reference = torch.nn.GRU(4, 4)
    reference.load_state_dict({f"{name}_l0": value for name, value in model.cell.state_dict().items()})
    torch.testing.assert_close(model(x), reference(x)[0])
