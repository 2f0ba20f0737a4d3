"""The causal-rank analysis never claims less dependence than there is.

Networks of the rule set are drawn, recorded in float64, and every element of every intermediate value is compared
with brute force: change one written position at a time, run again, see what moved. The rank must be at least the latest
position that moved the element; a value claimed to be known must be that value; intervals must hold every value.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, note
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from fxjacobi.causal_rules.domain import Abstract, Value, constant, unknown
from fxjacobi.causal_rules.finite_masks import LIMIT
from fxjacobi.causal_rules.interpreter import interpret
from fxjacobi.causal_rules.magnitudes import interval_of
from fxjacobi.causal_rules.registry import Context
from fxjacobi.graph import spec_of_value, stamp
from tests.properties.causal_networks import Program, networks


class _Everything(fx.Interpreter):
    """Keeps the value of every node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]


def everything(program: Program, x: torch.Tensor) -> dict[fx.Node, Any]:
    interpreter = _Everything(program.module)
    with torch.no_grad():
        interpreter.run(x, *program.constants)
    return interpreter.found


def brute_force(program: Program, kills: set[fx.Node] | None) -> tuple[dict[fx.Node, Any], dict[fx.Node, torch.Tensor]]:
    """Return every node's value, and for each element the latest position that moves it."""
    base = everything(program, program.start)
    if kills is not None:
        assume(not _poisoned(base, kills))
    latest = {n: torch.full(v.shape, -1) for n, v in base.items() if isinstance(v, torch.Tensor)}
    for position in range(int(program.rank.max()) + 1):
        for amount in (0.7, -3.0):
            x = program.start + amount * (program.rank == position)
            found = everything(program, x)
            if kills is not None:
                assume(not _poisoned(found, kills))
            for n, value in found.items():
                if n in latest:
                    old = base[n]
                    moved = (
                        (value != old) & ~(value.isnan() & old.isnan()) if value.is_floating_point() else value != old
                    )
                    latest[n] = torch.where(moved, position, latest[n])
    return base, latest


def _poisoned(values: dict[fx.Node, Any], kills: set[fx.Node]) -> bool:
    """Whether the premise fails that the solver checks at run time."""
    results = [values[n][0] if isinstance(values[n], tuple) else values[n] for n in kills]
    return any(bool(result.isnan().any()) for result in results)


def analysed(program: Program) -> tuple[Context, dict[fx.Node, Value]]:
    array = next(node for node in program.module.graph.nodes if node.op == "placeholder")
    context = Context(int(program.rank.max()), assumable={array: LIMIT})
    values: list[Value] = [Abstract(program.rank)]
    for number, (value, known) in enumerate(zip(program.constants, program.known, strict=True)):
        values.append(constant(value, f"constant_{number}") if known else unknown(value.shape))
    return context, interpret(context, program.module, values)


@given(networks())
def test_ranks_are_never_too_low_and_known_values_are_right(program: Program) -> None:
    note(f"{program.names}, known: {program.known}\n{program.module.graph}")
    context, env = analysed(program)
    base, latest = brute_force(program, context.kills)
    assert not context.unknown_ops, context.unknown_ops
    for node, moved in latest.items():
        if node.op == "output":
            continue
        value = env[node]
        assert isinstance(value, Abstract), node
        assert value.shape == tuple(moved.shape), node
        assert bool((value.rank >= moved).all()), f"{node}: rank {value.rank.tolist()}, moved by {moved.tolist()}"
        if value.known is not None and value.value is not None:
            wrong = value.known & (value.value != base[node]) & ~(value.value.isnan() & base[node].isnan())
            assert not bool(wrong.any()), f"{node}: {value.value}, not {base[node]}"
            assert bool((value.rank[value.known] == -1).all()), node


@given(networks())
def test_values_are_within_their_intervals(program: Program) -> None:
    """Rounding in float64 is so small that normalisations are as large as in exact arithmetic: ``lenient`` holds too."""
    note(f"{program.names}, known: {program.known}\n{program.module.graph}")
    context, env = analysed(program)
    with context.within(env):
        intervals = {(node, False): interval_of(context, node) for node in env}
        context.lenient = True
        intervals |= {(node, True): interval_of(context, node) for node in env}
    for scale in (1.0, 30.0, 1000.0):
        start = (program.start * scale).clamp(-LIMIT, LIMIT)
        for node, value in everything(program, start).items():
            value = value[0] if isinstance(value, (tuple, list)) else value
            for lenient in (False, True):
                found = intervals.get((node, lenient))
                if found is None or node.op == "output":
                    continue
                real = torch.as_tensor(value).double()
                assert bool(((real >= found.low) & (real <= found.high) | real.isnan()).all()), (node, found)
                if real.dim() and real.numel() and not bool(real.isnan().any()):
                    assert float(real.norm(dim=-1).max()) <= found.norm, (node, found)
                    assert float(real.abs().sum(-1).max()) <= found.total, (node, found)


@pytest.mark.parametrize("planted", ["convolution", "addmm", "_softmax", "slice"])
def test_an_unsound_rule_is_caught(planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: with a rule that forgets a dependence, it does."""
    from fxjacobi.causal_rules import interpreter

    def forget(context: Context, node: fx.Node, args: Any, kwargs: Any) -> Value:
        result = original(context, node, args, kwargs)
        if planted in str(node.target) and isinstance(result, Abstract):
            return Abstract((result.rank - 1).clamp(min=-1))
        return result

    original = interpreter.evaluate
    torch.manual_seed(0)
    weight = torch.randn(1, 1, 3, dtype=torch.float64)

    def run(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        head = torch.outer(torch.arange(1.0, 5.0, dtype=torch.float64), w.flatten().repeat(2)[:5])
        y = functional.conv1d(x[:, None], w, padding=1)[:, 0]
        return nn.functional.linear(y[:, 1:], head, head[:, 0]).softmax(-1)

    start = torch.randn(2, 6, dtype=torch.float64)
    module = make_fx(run)(start, weight)
    for node, value in everything(Program(module, start, torch.zeros(0), [weight], [True], []), start).items():
        if node.op != "output":
            stamp(node, spec_of_value(value))
    program = Program(module, start, torch.arange(6, dtype=torch.int32).expand(2, 6), [weight], [True], [])
    _, latest = brute_force(program, None)

    def sound() -> bool:
        _, env = analysed(program)
        found = {n: value for n, value in env.items() if isinstance(value, Abstract) and n in latest}
        return all(bool((value.rank >= latest[n]).all()) for n, value in found.items())

    assert sound()
    monkeypatch.setattr(interpreter, "evaluate", forget)
    assert not sound()
