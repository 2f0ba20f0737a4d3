"""What a causality proof costs: the analysis of a sampling loop beside one run of its network.

    for t in range(T):  x[..., t] = value(net(x)[..., t])

The loops are put together around a network that is recorded once, so nothing else is measured: taking the loop apart,
constants and masks known, ranks through the network, and the comparison of each step's rank with its place.
"""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxjacobi import ops
from fxjacobi.bench.benchmark import Benchmark, Row, Settings
from fxjacobi.bench.example_models import example
from fxjacobi.capture import capture
from fxjacobi.causal_rules.interpreter import operand_value
from fxjacobi.causality import CausalityProof, prove
from fxjacobi.emit import call
from fxjacobi.graph import site_of, spec_of, spec_of_value, stamp
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Step
from fxjacobi.timing import interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fxjacobi.causal_rules.domain import Value

__all__ = ["AnalysisCost", "CountedCalls", "loop_around"]

aten = torch.ops.aten


class CountedCalls(TorchDispatchMode):
    """Counts ATen calls, and elements of the results that are not views: work that no clock has to be trusted for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the call and count it."""
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.elements += result.numel()
        return result


def loop_around(
    model: nn.Module,
    array: torch.Tensor,
    places: Sequence[Sequence[int]],
    index: Callable[[Sequence[fx.Node]], tuple[Any, ...]],
    value: Callable[[fx.Graph, fx.Node, Sequence[fx.Node]], fx.Node],
) -> tuple[Loop, list[Value]]:
    """Return the loop that fills ``array`` from ``model(array)``, and what is known of its operands: all but the array.

    Args:
        model: The network; it is run once, to record it.
        array: What the loop starts from.
        places: For each coordinate of the place that a step writes, its value at every step.
        index: Turns the coordinates' nodes into the index of :func:`fxjacobi.ops.write`.
        value: Appends what the step writes, made of the network's output and the coordinates' nodes.
    """
    with torch.no_grad():
        recorded = capture(model, (array,), {}).graph_module
    graph, values = fx.Graph(), dict[fx.Node, fx.Node]()
    x = stamp(graph.placeholder("x"), spec_of_value(array))
    coordinates = [stamp(graph.placeholder(f"i{number}"), None) for number in range(len(places))]
    bindings: list[Binding] = [Carried(0, 1, (0,)), *(Literal(tuple(one)) for one in places)]
    known: list[Value] = [operand_value(array, None)]
    for node in recorded.graph.nodes:
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "get_attr":
            values[node] = stamp(graph.placeholder(node.name), spec_of(node))
            tensor = attrgetter(str(node.target))(recorded)
            bindings.append(Invariant(len(known)))
            known.append(operand_value(tensor, None if isinstance(tensor, nn.Parameter) else str(node.target)))
    for node in recorded.graph.nodes:
        if node.op in ("call_function", "call_module"):
            values[node] = stamp(graph.node_copy(node, values.__getitem__), spec_of(node), site_of(node))
    outputs: Any = recorded.graph.output_node().args[0]
    output = outputs[0]
    drawn = value(graph, values[output], coordinates)
    written = stamp(graph.call_function(ops.write, (x, drawn, index(coordinates))), spec_of(x))
    graph.output((written,))
    steps = len(places[0])
    return Loop(fx.GraphModule(recorded, graph), steps, bindings, [Step(0, steps - 1)]), known


def _selected(graph: fx.Graph, source: fx.Node, dim: int, place: fx.Node) -> fx.Node:
    node = call(graph, aten.select.int, source, dim, 0)
    node.args = (source, dim, place)
    return node


def _column(graph: fx.Graph, output: fx.Node, places: Sequence[fx.Node]) -> fx.Node:
    return _selected(graph, output, 1, places[0])


def _token(graph: fx.Graph, output: fx.Node, places: Sequence[fx.Node]) -> fx.Node:
    return call(graph, aten.argmax.default, _selected(graph, output, 1, places[0]), -1)


def _pixel(graph: fx.Graph, output: fx.Node, places: Sequence[fx.Node]) -> fx.Node:
    parameters = _selected(graph, _selected(graph, output, 3, places[1]), 2, places[0])
    return call(graph, aten.slice.Tensor, parameters, 1, 0, 1)


def _cases(quick: bool) -> Iterator[tuple[str, nn.Module, torch.Tensor, Callable[[], tuple[Loop, list[Value]]]]]:
    made = example("made")
    models: list[tuple[str, Any, torch.Tensor]] = [("MADE 24, batch 5", made.MADE(24, 32), torch.zeros(5, 24))]
    if not quick:
        tokens = torch.zeros(4, 784, dtype=torch.long)
        models += [
            ("MADE 784, batch 100", made.MADE(784, 512), torch.zeros(100, 784)),
            ("PixelCNN++ 28x28, batch 16", example("pixelcnnpp").untrained_digits().eval(), torch.zeros(16, 1, 28, 28)),
            ("transformer 784, batch 4", example("pixel_transformer").untrained(), tokens),
        ]
    for name, model, array in models:
        if array.dim() == 4:
            rows, columns = array.shape[2:]
            places: list[list[int]] = [
                [i for i in range(rows) for _ in range(columns)],
                [j for _ in range(rows) for j in range(columns)],
            ]
            yield name, model, array, partial(loop_around, model, array, places, lambda p: (None, None, *p), _pixel)
        else:
            value = _column if array.is_floating_point() else _token
            places = [list(range(array.shape[1]))]
            yield name, model, array, partial(loop_around, model, array, places, lambda p: (None, *p), value)


class AnalysisCost(Benchmark):
    """The proof beside one run of the network, at the batch that the sampling benchmarks use; goal: at most 3 runs.

    For a network of less than a millisecond the ratio says little: its proof takes a millisecond or two all the same.
    """

    name = "analysis-cost"
    summary = "causality proof of a sampling loop beside one run of its network"

    def rows(self, settings: Settings) -> Iterator[Row]:
        """Yield a row for each network."""
        torch.manual_seed(settings.seed)
        for name, model, array, build in _cases(settings.quick):
            loop, known = build()

            def analyse(loop: Loop = loop, known: list[Value] = known) -> CausalityProof:
                # A loop of its own each time: the analysis remembers what it took apart.
                outcome = prove(Loop(loop.body, loop.trip_count, loop.bindings, loop.results), known)
                assert isinstance(outcome, CausalityProof), outcome
                return outcome

            with torch.no_grad():
                network_s, analysis_s = interleaved([partial(model, array), analyse], rounds=settings.rounds)
                with CountedCalls() as network:
                    model(array)
                with CountedCalls() as analysis:
                    proof = analyse()
            nodes = sum(node.op == "call_function" for node in loop.body.graph.nodes)
            yield Row(
                name,
                {
                    "steps": len(proof.step_ranks),
                    "nodes": nodes,
                    "network_s": network_s,
                    "analysis_s": analysis_s,
                    "runs": analysis_s / network_s,
                    "calls_per_node": analysis.calls / nodes,
                    "elements": analysis.elements,
                    "network_elements": network.elements,
                },
            )

    def cases(self) -> tuple[str, ...]:
        """The networks."""
        return ("MADE 24, batch 5", "MADE 784, batch 100", "PixelCNN++ 28x28, batch 16", "transformer 784, batch 4")
