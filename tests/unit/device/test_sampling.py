"""Sampling loops as captured sweeps, on the CPU double: samples, sweeps and certificates of the uncaptured block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from fxjacobi import ops
from fxjacobi.causality import CausalityProof, prove
from fxjacobi.certificate import Certificate, Solution
from fxjacobi.device import installed
from fxjacobi.device.sampling import SamplingForm
from fxjacobi.errors import GuardFailed
from fxjacobi.loops import Result, Stacked, Step
from fxjacobi.sampling import JacobiWrites
from fxjacobi.testing.graph_double import GraphDouble, host_reads
from tests.unit.sampling_loops import chain, guess_overflows, made_loop, same

if TYPE_CHECKING:
    from tests.unit.sampling_loops import Sampling

aten = torch.ops.aten
inf, nan = float("inf"), float("nan")


def both(
    sampling: Sampling, *, window: int | None = None
) -> tuple[SamplingForm, Solution | None, Solution | None, GraphDouble]:
    """Solve uncaptured and captured; assert equal bits and no host reads; return the records of both."""
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof), proof
    block, double = JacobiWrites(proof, window=window, drop=False), GraphDouble()
    form = SamplingForm(block, double, torch.device("cpu"))
    with torch.no_grad():
        wanted = block(*sampling.operands)
        form.adopt(sampling.operands, wanted)
        with host_reads() as reads:
            solved = form(sampling.operands)
    if solved is None:
        return form, None, block.last, double
    assert not reads
    assert same(solved[0], wanted)
    assert same(solved[0], sampling.ordinary())
    return form, solved[1], block.last, double


@pytest.mark.parametrize("window", [None, 1, 5, 11, 12])
def test_the_report_is_that_of_the_uncaptured_block(window: int | None) -> None:
    form, found, wanted, double = both(made_loop(), window=window)
    assert double.captures == 2  # the start of a call, and a sweep
    assert found == wanted
    assert form.reason == "each sweep is a captured graph"


def test_flags_are_read_one_sweep_late_and_the_extra_sweep_changes_nothing() -> None:
    _, found, wanted, double = both(made_loop(size=96))
    assert found == wanted
    assert found is not None
    assert found.certificate is Certificate.REPEATED
    assert max(double.lateness) == 1
    # Per solve: the start, the sweeps, and one that was on its way; then the check of the captures' own start.
    assert double.replays == 2 * (1 + found.sweeps + 1) + 1


@pytest.mark.parametrize("value", [inf, -inf, nan])
@pytest.mark.parametrize("step", [0, 5, 11])
@pytest.mark.parametrize("window", [None, 4])
def test_non_finite_values_of_the_ordinary_run_are_kept(value: float, step: int, window: int | None) -> None:
    noise = torch.randn(12, 3)
    noise[step, 1] = value
    form, found, wanted, _ = both(made_loop(noise=noise), window=window)
    assert form.refused is None
    if found is None:  # what the sweeps cannot answer is run uncaptured
        assert wanted is not None
        assert wanted.certificate is Certificate.NOT_FINITE
    else:
        assert found == wanted


@pytest.mark.parametrize("value", [inf, nan])
def test_initial_values_that_are_not_finite(value: float) -> None:
    form, found, wanted, _ = both(made_loop(start=torch.full((3, 12), value)))
    assert form.refused is None
    assert found is None
    assert wanted is not None
    assert wanted.certificate is Certificate.NOT_FINITE


def test_guesses_that_are_not_finite_are_put_back_and_the_sweeps_go_on() -> None:
    _, found, wanted, _ = both(guess_overflows())
    assert found == wanted
    assert found is not None
    assert found.completed == 0


@pytest.mark.parametrize("grow", [3.0, 40.0])
def test_what_the_sweeps_cannot_answer_runs_uncaptured(grow: float) -> None:
    form, found, wanted, double = both(chain(grow))
    assert form.refused is None
    assert double.captures == 2
    assert found is None
    assert wanted is not None
    assert wanted.certificate is Certificate.NOT_FINITE


@pytest.mark.parametrize("window", [None, 5])
def test_results_of_single_steps_and_stacks(window: int | None) -> None:
    results: list[Result] = [Step(0, 11), Step(0, 4), Stacked(1), Step(2, 7), Stacked(0)]
    form, found, wanted, double = both(made_loop(results=results), window=window)
    if window is None:
        assert found == wanted
        assert double.captures == 2
    else:
        assert form.reason == "runs uncaptured: results of all steps are wanted of a window"


def test_other_operands_are_served_by_the_same_capture() -> None:
    first, second = made_loop(), made_loop()
    form, *_, double = both(first)
    operands = [*second.operands[:2], *first.operands[2:]]
    one, two = form(first.operands), form(operands)
    assert one is not None
    assert two is not None
    with torch.no_grad():
        assert same(two[0], first.loop(*operands))
    assert same(one[0], first.ordinary())  # in memory of its own
    assert double.captures == 2
    assert form([operands[0], operands[1].double(), *operands[2:]]) is None


def test_a_capture_that_gives_other_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxjacobi.device import sampling as module

    honest = module._SamplingSession._evaluate

    def wrong(self: Any, rows: Any) -> Any:
        ends, nan = honest(self, rows)
        return [end + 2.0**-20 for end in ends], nan

    monkeypatch.setattr(module._SamplingSession, "_evaluate", wrong)
    form, found, _, _ = both(made_loop())
    assert found is None
    assert "other bits" in form.reason


def test_guards_are_checked_on_the_values_of_the_device() -> None:
    sampling = made_loop(size=6)
    graph = sampling.loop.body.graph
    value: Any = graph.output_node().args[0][1]  # type: ignore[index]
    with graph.inserting_before(graph.output_node()):
        every = graph.call_function(aten.all.default, (graph.call_function(aten.gt.Scalar, (value, -50.0)),))
        check = graph.call_function(ops.guard, (every, True))
        for node in (every.args[0], every, check):
            node.meta["spec"] = None if node is check else value.meta["spec"]  # type: ignore[union-attr]
    sampling.loop.body.recompile()
    form, found, wanted, _ = both(sampling)
    assert found == wanted
    wild = [sampling.operands[0], sampling.operands[1] - 100.0, *sampling.operands[2:]]
    with pytest.raises(GuardFailed):
        form(wild)


def test_the_block_uses_its_form_from_the_second_call_on() -> None:
    sampling = made_loop()
    proof = prove(sampling.loop, sampling.known)
    assert isinstance(proof, CausalityProof)
    block, double = JacobiWrites(proof, drop=False), GraphDouble()
    with torch.no_grad(), installed("cpu", double):
        wanted, record = block(*sampling.operands), block.last
        before = double.replays
        assert same(block(*sampling.operands), wanted)
    assert double.replays > before
    assert block.last == record
    assert block.reason.endswith("each sweep is a captured graph")
    with torch.no_grad():
        assert same(block(*sampling.operands), wanted)  # nothing captures: uncaptured again
