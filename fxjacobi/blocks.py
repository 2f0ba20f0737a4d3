"""What the compiler asks of a block's run-time module, whichever method it holds.

A block stands in a graph where its :class:`fxjacobi.loops.Loop` stood: it takes the same operands and returns the
same results. A bare loop is the sequential block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, TypeGuard, runtime_checkable

from fxjacobi.loops import Kind, Loop
from fxjacobi.plan import BlockPlan, Candidate, Plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx, nn

    from fxjacobi.certificate import Solution
    from fxjacobi.methods.method import Method

__all__ = [
    "Block",
    "WarmStarting",
    "block_kind",
    "last_solution",
    "loop_of",
    "method_of",
    "plan_of_block",
    "plan_of_graph",
    "plan_of_now",
]


class Block(Protocol):
    """A solved loop.

    Attributes:
        loop: The loop whose place it takes; calling it is the block's definition.
        method: How it is solved, in a word or two.
        reason: Why so.
        last: What the last call did, or ``None`` before the first.
    """

    loop: Loop
    method: str | Method
    reason: str
    last: Solution | None


@runtime_checkable
class WarmStarting(Protocol):
    """A block that can start from its solution of the call before.

    Attributes:
        warm_start: Whether it does.
    """

    warm_start: bool

    def forget(self) -> None:
        """Start the next call without what the calls before left behind."""


def _is_block(module: nn.Module) -> TypeGuard[Block]:
    """Whether ``module`` has what a block has.

    From Python 3.12 on ``isinstance`` with a protocol looks past ``__getattr__``, where a module keeps its submodules.
    """
    return all(hasattr(module, name) for name in ("loop", "method", "reason", "last"))


def loop_of(module: nn.Module) -> Loop | None:
    """The loop that ``module`` is or solves, or ``None`` if it is no block."""
    if isinstance(module, Loop):
        return module
    return module.loop if _is_block(module) else None


def method_of(module: nn.Module) -> str:
    """The method that a block is solved by."""
    if not _is_block(module):
        return "sequential"
    return module.method if isinstance(module.method, str) else module.method.name.lower()


def last_solution(module: nn.Module) -> Solution | None:
    """What the last solve of a block did."""
    return module.last if _is_block(module) else None


def block_kind(module: nn.Module) -> str:
    """The word that a block is named by."""
    loop = loop_of(module)
    assert loop is not None
    return "jacobi" if method_of(module).startswith("jacobi") else loop.kind.value


def plan_of_block(name: str, module: nn.Module, node: fx.Node, candidates: tuple[Candidate, ...] = ()) -> BlockPlan:
    """The plan's row for one block."""
    loop = loop_of(module)
    assert loop is not None
    operations = [n for n in loop.body.graph.nodes if n.op in ("call_function", "call_module")]
    site = next((str(n.meta["site"]) for n in operations if n.meta.get("site")), "")
    reason = module.reason if _is_block(module) else getattr(module, "reason", "")
    return BlockPlan(
        name=name,
        kind=Kind.WRITES if method_of(module).startswith("jacobi") and hasattr(module, "proof") else loop.kind,
        method=method_of(module),
        equations=loop.trip_count,
        operations=len(operations),
        reason=reason or _sequential_reason(loop),
        proof=getattr(module, "proof_sentence", ""),
        nodes=(node.name,),
        site=site,
        candidates=candidates,
        memory_bytes=getattr(module, "memory_bytes", None),
    )


def plan_of_now(plan: Plan, module: fx.GraphModule) -> Plan:
    """The plan with what its blocks say of themselves now: they go on measuring while they are called."""
    rows = []
    for row in plan.blocks:
        block = module.get_submodule(row.name) if row.kind is not None else module
        if row.kind is not None and _is_block(block):
            reason, proof = block.reason or row.reason, getattr(block, "proof_sentence", "")
            row = replace(row, method=method_of(module.get_submodule(row.name)), reason=reason, proof=proof)
        rows.append(row)
    return replace(plan, blocks=tuple(rows))


def _sequential_reason(loop: Loop) -> str:
    carries = "float state" if loop.kind.value == "recurrence" else "state"
    return f"each step needs the one before, and its {carries} settles to the last bit only one step a sweep"


def plan_of_graph(
    module: fx.GraphModule, candidates: Mapping[int, tuple[Candidate, ...]] | None = None
) -> tuple[tuple[BlockPlan, ...], tuple[tuple[str, str], ...]]:
    """Rows and edges of the plan of an emitted module; each node of its graph is in exactly one row."""
    rows: list[BlockPlan] = []
    place: dict[fx.Node, int] = {}
    straight: list[fx.Node] = []

    def close() -> None:
        if straight:
            name = f"straight_{sum(row.kind is None for row in rows)}"
            for node in straight:
                place[node] = len(rows)
            site = next((str(n.meta["site"]) for n in straight if n.meta.get("site")), "")
            names = tuple(n.name for n in straight)
            rows.append(BlockPlan(name, None, "once", 1, len(straight), "outside any loop", "", names, site))
            straight.clear()

    for node in module.graph.nodes:
        if node.op == "call_module":
            block = module.get_submodule(str(node.target))
            if loop_of(block) is not None:
                close()
                place[node] = len(rows)
                measured = (candidates or {}).get(id(loop_of(block)), ())
                rows.append(plan_of_block(str(node.target), block, node, measured))
                continue
        if node.op in ("call_function", "call_module"):
            straight.append(node)
    close()
    edges = {
        (rows[place[source]].name, rows[place[node]].name): None
        for node in module.graph.nodes
        for source in node.all_input_nodes
        if source in place and node in place and place[source] != place[node]
    }
    return tuple(rows), tuple(edges)
