"""Causality: one evaluation of a sampling loop's network serves all its steps, or the reason why not.

    for t in range(T):  X[p_t] = v_t(G(X), noise_t)         X: (B, ...), p_t: the positions that step t writes

has the sequential answer as the fixed point of ``X = write(G(X))`` if, for every t, the value written at step t
depends on positions written before step t only. Positions written at step t have rank t, all others -1; an abstract
interpretation of the body finds the largest rank that each element of each tensor may depend on
(:mod:`fxjacobi.causal_rules`), at about the cost of one evaluation. The loop is causal if

    rank(v_t) < t                                           for every t

(With K writes a step, the k-th of step t is equation ``t * K + k``, and a read of the array between two writes may
depend on the equations before it.) This is the triangular structure of arXiv 2002.03629, section 3, found in the graph
instead of being known beforehand.

It must not be used without :mod:`fxjacobi.sampling`: a proof that removes a dependence by an exact zero holds for finite
values only, and the solver checks that at run time on the nodes named in ``CausalityProof.kills``.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from fxjacobi.array_loop import ArrayLoop, array_loop
from fxjacobi.array_paths import NotAnArrayLoop
from fxjacobi.causal_rules.blame import blame
from fxjacobi.causal_rules.domain import NOTHING, Abstract, Value, squash_equal, unknown
from fxjacobi.causal_rules.finite_masks import LIMIT
from fxjacobi.causal_rules.interpreter import interpret
from fxjacobi.causal_rules.registry import Context, tensors_in
from fxjacobi.causality_proof import CausalityProof, Refusal, UnknownOp
from fxjacobi.graph import TensorSpec, operation_of, site_of, spec_of
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Table
from fxjacobi.rule_table import overloads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

__all__ = ["CausalityProof", "Refusal", "UnknownOp", "prove"]

_log = logging.getLogger(__name__)

_SELECTS = frozenset(overloads("index.Tensor", "index_select", "gather", "take_along_dim", "take"))


def prove(loop: Loop, operands: Sequence[Value] | None = None, *, thorough: bool = True) -> CausalityProof | Refusal:
    """Prove that each value that ``loop`` writes depends on earlier writes only, or say what breaks it.

    Args:
        loop: A loop whose only carry is an array that the body writes in part, for example
            ``x' = write(x, f(net(x)[:, t], noise_t), (None, t))``.
        operands: Abstract values of the loop's operands, known where they are constants
            (:func:`fxjacobi.causal_rules.interpreter.operand_value`); ``None``: nothing is known of them.
        thorough: Whether to go to the end: to let finite masks rest on how large normalisations are found to be at run
            time, and to name the operation to blame, which takes longer than finding that there is one. A first try
            without the values of parameters need not.
    """
    try:
        structure = _structure(loop)
        return _Analysis(structure, operands, thorough).run()
    except NotAnArrayLoop as reason:
        node = reason.node
        if node is None:
            return Refusal(str(reason))
        return Refusal(str(reason), node=node.name, op=operation_of(node), site=str(site_of(node) or "") or None)


_structures: WeakKeyDictionary[Loop, ArrayLoop] = WeakKeyDictionary()
"""Loops taken apart: the same one is analysed again with more constants known."""


def _structure(loop: Loop) -> ArrayLoop:
    found = _structures.get(loop)
    if found is None:
        found = _structures[loop] = array_loop(loop)
    return found


@dataclass
class _Analysis:
    """The analysis of one loop."""

    structure: ArrayLoop
    operands: Sequence[Value] | None
    thorough: bool = True
    ranks: dict[str, torch.Tensor] = field(default_factory=dict)

    def run(self) -> CausalityProof | Refusal:
        context = self._context(finite_masks=False)
        outcome = self._outcome(context)
        if isinstance(outcome, Refusal) and context.attends:
            # Bounds cost a pass over the weights, and limits to keep to: only where masks of -inf do not suffice.
            self.ranks = {}
            outcome = self._outcome(self._context(finite_masks=True))
        return outcome

    def _context(self, *, finite_masks: bool) -> Context:
        structure = self.structure
        placeholders = [*structure.versions, *(n for n, b in structure.bindings.items() if isinstance(b, Invariant))]
        limits = dict.fromkeys(placeholders, LIMIT)
        return Context(
            structure.equations - 1, finite_masks=finite_masks, may_be_lenient=self.thorough, assumable=limits
        )

    def _outcome(self, context: Context) -> CausalityProof | Refusal:
        structure = self.structure
        position_ranks = structure.ranks()
        count = len(structure.writes)
        # Reads of each version are held to the equations before it, in a run of their own.
        read = {structure.versions[node] for node in structure.versions if self._is_read(node)}
        step_ranks = torch.full((structure.equations,), NOTHING, dtype=torch.int64)
        for version in sorted(read):
            refusal = self._run_version(context, version, position_ranks, step_ranks)
            if refusal is not None:
                return refusal
        _log.debug("causal: %d equations, %d a step", structure.equations, count)
        return CausalityProof(
            structure=structure,
            position_ranks=position_ranks,
            ranks=self.ranks,
            step_ranks=tuple(step_ranks.tolist()),
            kills=tuple(node.name for node in structure.loop.body.graph.nodes if node in context.kills),
            limits=self._limits(context),
            reads=frozenset(context.reads),
            unknown_ops=_named(context),
        )

    def _limits(self, context: Context) -> dict[str, float]:
        """Name what is limited; the array's versions are one array to the solver."""
        array = self.structure.array
        return {(array if n in self.structure.versions else n).name: limit for n, limit in context.limits.items()}

    def _is_read(self, version: fx.Node) -> bool:
        """Whether the network or the tail reads this version (and not only the next write)."""
        structure = self.structure
        outside = {write.node for write in structure.writes}
        if version in structure.ends:
            return True
        return any(access.source is version for access in structure.accesses.values()) or any(
            user not in outside and user.op != "output" for user in version.users
        )

    def _placeholders(self, version: int, position_ranks: torch.Tensor) -> dict[fx.Node, Value]:
        """Return what is known of the array's versions and of what is the same at every step."""
        structure = self.structure
        values: dict[fx.Node, Value] = {}
        blank = torch.tensor(NOTHING, dtype=torch.int32).expand(position_ranks.shape)
        for node, number in structure.versions.items():
            values[node] = Abstract(squash_equal(position_ranks) if number == version else blank)
        for node, binding in structure.bindings.items():
            if isinstance(binding, Invariant):
                spec = spec_of(node)
                if self.operands is not None:
                    values[node] = self.operands[binding.operand]
                else:
                    values[node] = unknown(spec.shape) if isinstance(spec, TensorSpec) else None
        return values

    def _run_version(
        self, context: Context, version: int, position_ranks: torch.Tensor, step_ranks: torch.Tensor
    ) -> Refusal | None:
        structure = self.structure
        env = interpret(context, structure.loop.body, self._placeholders(version, position_ranks))
        for node in structure.touched:
            if node in env and version == 0:
                for number, tensor in enumerate(tensors_in(env[node])):
                    name = node.name if isinstance(env[node], Abstract) else f"{node.name}[{number}]"
                    self.ranks[name] = tensor.rank
        count = len(structure.writes)
        clocks = torch.arange(structure.trip_count, dtype=torch.int64) * count + version
        for order, end in enumerate(structure.ends):
            bound = self._bound(env, end, clocks)
            broken = (bound >= clocks).nonzero()[:, 0].tolist()
            for step in broken:
                exact = self._exact(context, env, end, step, int(clocks[step]))
                bound[step] = exact.highest
                if exact.highest >= int(clocks[step]):
                    return self._refuse(context, env, end, order, step, version, exact)
            if order < count and end is structure.writes[order].value:
                step_ranks[order::count] = torch.maximum(step_ranks[order::count], bound)
        return None

    def _bound(self, env: dict[fx.Node, Value], end: fx.Node, clocks: torch.Tensor) -> torch.Tensor:
        """Return, for each step, the highest rank among all that ``end`` rests on."""
        structure = self.structure
        bound = torch.full((structure.trip_count,), NOTHING, dtype=torch.int64)
        for used in structure.uses(end):
            if used in structure.accesses:
                bound = torch.maximum(bound, self._accessed(env, used, clocks).amax(1).to(torch.int64))
            elif used in structure.states:
                before = torch.arange(structure.trip_count) * len(structure.writes) - 1
                bound = torch.maximum(bound, before)
            elif used in env:
                highest = max((tensor.highest for tensor in tensors_in(env[used])), default=NOTHING)
                bound = torch.clamp(bound, min=highest)
        return bound

    def _accessed(self, env: dict[fx.Node, Value], node: fx.Node, clocks: torch.Tensor) -> torch.Tensor:
        """Return the ranks of the elements that each step selects, ``(T, elements)``; a scalar is one element."""
        access = self.structure.accesses[node]
        source = env[access.source]
        assert isinstance(source, Abstract)
        rank = source.rank.reshape(-1)[access.positions.reshape(len(clocks), -1)]
        if access.source in self.structure.versions:
            # An element that is not written yet holds what it held before the loop.
            rank = torch.where(rank >= clocks[:, None], NOTHING, rank)
        return rank if rank.numel() else torch.full((len(rank), 1), NOTHING)

    def _exact(self, context: Context, env: dict[fx.Node, Value], end: fx.Node, step: int, clock: int) -> Abstract:
        """Interpret the tail at one step, element by element."""
        structure = self.structure
        values = dict(env)
        clocks = torch.tensor([clock])
        for node, access in structure.accesses.items():
            source = env[access.source]
            assert isinstance(source, Abstract)
            here = access.positions[step]
            rank = source.rank.reshape(-1)[here]
            if access.source in structure.versions:
                rank = torch.where(rank >= clocks, NOTHING, rank)
            if source.known is None or source.value is None:
                values[node] = Abstract(rank)
            else:
                known, value = source.known.reshape(-1)[here], source.value.reshape(-1)[here.to(source.value.device)]
                values[node] = Abstract(rank, known, value, source.sources)
        for node, binding in structure.bindings.items():
            match binding:
                case Literal(literals):
                    values[node] = literals[step]
                case Scanned():
                    values[node] = _blank(node)
                case Carried() if node in structure.states:
                    # Each step's reads are held to what is written before it; so is what it hands to the next.
                    values[node] = _blank(node, step * len(structure.writes) - 1)
                case Table(operands):
                    values[node] = self.operands[operands[step]] if self.operands is not None else _blank(node)
        # Absorbing constants inside the tail are not watched at run time, so they may not remove anything.
        inner = Context(context.top, may_kill=False, reads=context.reads, unknown_ops=context.unknown_ops)
        result = interpret(inner, structure.loop.body, values).get(end)
        if isinstance(result, Abstract):
            return result
        highest = max((tensor.highest for tensor in tensors_in(result)), default=NOTHING)
        return unknown((), highest)

    def _refuse(
        self,
        context: Context,
        env: dict[fx.Node, Value],
        end: fx.Node,
        order: int,
        step: int,
        version: int,
        exact: Abstract,
    ) -> Refusal:
        structure = self.structure
        count = len(structure.writes)
        clock = step * count + version
        rank = exact.highest
        worst = int((exact.rank >= clock).reshape(-1).nonzero()[0]) if exact.rank.numel() else 0
        element = None
        what = f"an output of the loop ({end}), computed"
        if order < count:
            write = structure.writes[order]
            positions = write.positions[step]
            if exact.shape != tuple(positions.shape):
                spread = torch.broadcast_to(exact.rank, positions.shape).reshape(-1)
                worst = int((spread >= clock).nonzero()[0])
            element = tuple(
                int(i) for i in torch.unravel_index(positions.reshape(-1)[worst], structure.array_spec.shape)
            )
            what = f"element {list(element)} of the array, written"
        elif any(end in guard.args for guard in structure.guards):
            what = f"the branch on {end}, taken"
        stepped = structure.stepped(end)
        if not self.thorough or (context.attends and not context.finite_masks):
            return Refusal(f"{what} at step {step}, depends on step {rank // count}", element, step, rank)
        culprit = blame(context, structure, env, end, step, clock, rank) if stepped is None else stepped[0]
        site = str(site_of(culprit) or "")
        unknown_ops = _named(context)
        names = "; operations without a rule: " + ", ".join(one.op for one in unknown_ops) if unknown_ops else ""
        names += "".join(f"; {operation_of(n)} ({n.name}): {note}" for n, note in list(context.notes.items())[:1])
        where = f" at {site}" if site else ""
        if stepped is not None and culprit.target in _SELECTS and culprit.args[0] is not stepped[1]:
            where += f", which selects by {stepped[1]}, a tensor; select by a number, and the network serves all steps"
        elif stepped is not None:
            where += f", which reads {stepped[1]}, another value at each step, so that no network serves all steps"
        when = "itself" if rank == clock else f"step {rank // count}"
        return Refusal(
            reason=f"{what} at step {step}, depends on {when} through {operation_of(culprit)} ({culprit.name}){where}{names}",
            element=element,
            step=step,
            rank=rank,
            node=culprit.name,
            op=operation_of(culprit),
            site=site or None,
            unknown_ops=unknown_ops,
        )


def _blank(node: fx.Node, rank: int = NOTHING) -> Value:
    spec = spec_of(node)
    return unknown(spec.shape, rank) if isinstance(spec, TensorSpec) else None


def _named(context: Context) -> tuple[UnknownOp, ...]:
    return tuple(UnknownOp(node.name, op, str(site_of(node) or "")) for node, op in context.unknown_ops.items())
