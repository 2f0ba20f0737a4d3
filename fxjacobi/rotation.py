"""Where the iterations of a repeated stretch begin: any rotation of the period is a loop, and not all are equally good."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np

from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.tape import NOT_A_SELECT

if TYPE_CHECKING:
    from fxjacobi.tape import Integers, Tape

__all__ = ["rotation"]


def rotation(tape: Tape, start: int, stop: int, period: int, minimum_trips: int) -> tuple[int, int, int]:
    """Return start, period and trips of the loop in ``[start, stop)``, every rotation of which is a loop.

    Iterations begin where the fewest values live on into the next that a recurrence hands on to itself. Of equals,
    where the fewest values at all live on; then the fewest bytes of the recurrences' values; then where the last
    iteration ends with the stretch, since first iterations differ more often than last ones; then the first place.
    (Values of no recurrence that live on, such as a coefficient that the next step reads too, are computed for all
    steps at once later.)

    Before all that, no cut is to lie between an operation of several outputs and the ``getitem`` that unpacks it, which
    would carry a tuple. One iteration is given up where that avoids such a cut or makes the recurrences' values fewer,
    if more than ``minimum_trips`` are there.
    """
    trips, slack = divmod(stop - start, period)
    middle = start + trips // 2 * period  # what crosses the ends may be special
    begin, end = int(tape.first[middle]), int(tape.first[middle + period])
    used = ~tape.literal[begin:end] & (tape.values[begin:end] >= start)
    values, owner = tape.values[begin:end][used], tape.owner[begin:end][used]
    source, target = (values - start) % period, (owner - start) % period
    nodes = np.arange(middle, middle + period)
    specs = [spec_of(tape.nodes[node]) for node in nodes.tolist()]
    base = tape.select_base[nodes]
    one = np.where((base != NOT_A_SELECT) & (base < start), 0, 1)  # a slice of what is there before is read anew
    unpacked = np.array([isinstance(spec, tuple) for spec in specs], dtype=np.int64)
    size = np.array([_bytes(spec) if isinstance(spec, TensorSpec) else 0 for spec in specs], dtype=np.int64)
    life = np.zeros(period, dtype=np.int64)
    np.maximum.at(life, source, owner - values)
    own = np.zeros(period, dtype=np.int64)  # how long until a recurrence has read its own value for the last time
    component = _components(source, target, period)
    within = component[source] == component[target]
    np.maximum.at(own, source[within], (owner - values)[within])
    late = np.arange(period) != slack
    tuples, carried = _crossing(life, unpacked), _crossing(own, one)
    order = np.lexsort((late, _crossing(own, one * size), _crossing(life, one), carried, tuples))
    shift, anywhere = int(order[np.argmax(order <= slack)]), int(order[0])
    fewer = (tuples[anywhere], carried[anywhere]) < (tuples[shift], carried[shift])
    if fewer and trips > minimum_trips:
        return start + anywhere, period, trips - 1
    return start + shift, period, trips


def _bytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _components(sources: Integers, targets: Integers, period: int) -> Integers:
    """The strongly connected component of each position of a period, given which position's value which reads."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(period))
    graph.add_edges_from(zip(sources.tolist(), targets.tolist(), strict=True))
    component = np.empty(period, dtype=np.int64)
    for number, members in enumerate(nx.strongly_connected_components(graph)):
        component[list(members)] = number
    return component


def _crossing(life: Integers, weight: Integers) -> Integers:
    """For each position of the period the weight of the values that live on across the cut before it."""
    period = len(life)
    cost = np.full(period, int((life // period * weight).sum()))
    for at in np.flatnonzero(life % period * weight).tolist():
        cost[(at + 1 + np.arange(life[at] % period)) % period] += weight[at]
    return cost
