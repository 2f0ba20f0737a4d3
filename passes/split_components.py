"""split_components: one loop for each strongly connected component of a loop's dependence graph.

Fires on every :class:`fxjacobi.loops.Loop`, inner loops first. For the body ``p = f(x); h = g(h, p); y = k(h)``::

    before                                       after
    loop_0 = self.loop_0(xs, h0)                 map_0 = self.map_0(xs)              # all T of f
                                                 recurrence_1 = self.recurrence_1(map_0[0], h0)
                                                 map_2 = self.map_2(recurrence_1[0]) # all T of k

Values that depend on invariants only are computed once, before. What is needed at one step only becomes straight code.
Must not fire on a loop that :func:`refusal` names a reason for; that loop stays as it is.

Source: R. Allen and K. Kennedy, Automatic translation of FORTRAN programs to vector form, 1987 (loop distribution).
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx, nn

from fxjacobi.distribution import distribute
from fxjacobi.drafts import At, Draft, Drafts, Hoisted, Operand, Reference, Stack
from fxjacobi.emit import call, dense_stride, rebuilt, tensors_of
from fxjacobi.equations import body_outputs, equations_of, is_effect
from fxjacobi.errors import PassError
from fxjacobi.graph import TensorSpec, is_random, site_of, spec_of, stamp
from fxjacobi.loops import Carried, Invariant, Loop, Scanned, Stacked, read_at
from fxjacobi.ops import guard_shape
from fxjacobi.passes.base import Pass, PassResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["SplitComponents", "refusal"]

aten = torch.ops.aten
logger = logging.getLogger(__name__)


def refusal(loop: Loop) -> str:
    """Return why ``loop`` must stay whole, or an empty string."""
    outputs = body_outputs(loop.body)
    if not all(isinstance(n, fx.Node) and isinstance(spec_of(n), TensorSpec) for n in outputs):
        return "the body returns something that is not a tensor"
    if any(is_random(node) for node in loop.body.graph.nodes):
        return "the body draws random numbers, whose order is the program's"
    for node in loop.body.graph.nodes:
        if node.target is guard_shape:
            return f"the shape that {node.name} guards depends on data, so its steps cannot be stacked"
        if node.op.startswith("call") and not is_effect(node) and not any(tensors_of(spec_of(node))):
            return f"{node.name} is a Python value, which cannot be stacked"
    for component in equations_of(loop).recurrences:
        if all(node.op == "placeholder" for node in component.nodes):
            return "carried values change places without being computed"
    return ""


class _Rewriter:
    """The graph that takes a module's place, as it grows."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = fx.Graph()
        self.added: dict[str, nn.Module] = {}
        self._taken = {name for name, _ in module.named_modules()}

    def add(self, stem: str, module: nn.Module) -> str:
        """Register ``module`` under a free name and return it."""
        number = len(self.added)
        while f"{stem}_{number}" in self._taken:
            number += 1
        name = f"{stem}_{number}"
        self._taken.add(name)
        self.added[name] = module
        return name

    def copy(self, node: fx.Node, env: Mapping[fx.Node, Any], owner: fx.GraphModule) -> fx.Node:
        """Append a copy of ``node`` of a loop's body; literals among its arguments become their values."""
        args: Any = fx.map_arg(node.args, lambda n: env[n])
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: env[n])
        target = node.target
        if node.op == "call_module":
            module = owner.get_submodule(str(target))
            known = [name for name, added in self.added.items() if added is module]
            target = known[0] if known else self.add(str(target).replace(".", "_"), module)
        new = self.graph.create_node(node.op, target, args, kwargs)
        return stamp(new, spec_of(node), site_of(node))


class _Emitter:
    """Straight code, blocks and the values between them, in the place of one loop."""

    def __init__(self, into: _Rewriter, drafts: Drafts, operands: Sequence[fx.Node]) -> None:
        self.into, self.drafts, self.operands = into, drafts, operands
        self.made: dict[Reference, fx.Node] = {}

    def emit(self) -> list[fx.Node]:
        """Append everything; return a node for each result of the loop."""
        loop, equations = self.drafts.loop, self.drafts.distribution.equations
        hoisted: dict[fx.Node, fx.Node] = {}
        for node in loop.body.graph.nodes:
            if node in equations.invariant and node in self.drafts.distribution.live:
                binding = equations.bindings.get(node)
                if isinstance(binding, Invariant):
                    hoisted[node] = self.operands[binding.operand]
                else:
                    hoisted[node] = self.made[Hoisted(node)] = self.into.copy(node, hoisted, loop.body)
        for draft in self.drafts.drafts:
            if draft.exports or any(is_effect(n) for n in draft.block.nodes):
                values = [self.value(reference) for reference in draft.operands]
                straight = len(draft.block.steps) == 1 and not draft.block.recurrence
                made = self._straight(draft, values) if straight else self._loop(draft, values)
                self.made.update(zip(draft.exports, made, strict=True))
        return [self.value(reference) for reference in self.drafts.results]

    def value(self, reference: Reference) -> fx.Node:
        """Return the node of ``reference``, appending what makes it of values that no block makes."""
        if reference not in self.made:
            match reference:
                case Operand(index):
                    self.made[reference] = self.operands[index]
                case At(node, step):
                    self.made[reference] = self._slice(node, step)
                case Stack(node):
                    self.made[reference] = self._stack(node)
                case Hoisted(node):
                    raise PassError(f"{node.name} is read before it is computed")
        return self.made[reference]

    def _slice(self, node: fx.Node, step: int) -> fx.Node:
        binding = self.drafts.bindings.get(node)
        if not isinstance(binding, Scanned):
            raise PassError(f"{node.name} at step {step} is read before it is computed")
        return call(
            self.into.graph, aten.select.int, self.operands[binding.operand], binding.dim, binding.indices[step]
        )

    def _stack(self, node: fx.Node) -> fx.Node:
        """Append ``node`` of all steps, where no block makes it: a delayed value, or one from outside the loop."""
        graph, trip_count, drafts = self.into.graph, self.drafts.loop.trip_count, self.drafts
        binding, behind = drafts.bindings.get(node), drafts.delayed_elsewhere(node)
        if node in drafts.distribution.equations.invariant:
            value = self.value(drafts.at(node, 0))
            spec = spec_of(value)
            assert isinstance(spec, TensorSpec)
            repeated = call(graph, aten.expand.default, value, [trip_count, *spec.shape])
            return call(graph, aten.contiguous.default, repeated)
        if isinstance(binding, Scanned):
            start = binding.indices[0]
            if list(binding.indices) == list(range(start, start + trip_count)):
                whole = self.operands[binding.operand]
                part = call(graph, aten.slice.Tensor, whole, binding.dim, start, start + trip_count)
                return call(graph, aten.contiguous.default, call(graph, aten.movedim.int, part, binding.dim, 0))
        if behind is None or drafts.by_table(behind):
            return call(graph, aten.stack.default, [self.value(drafts.at(node, t)) for t in range(trip_count)])
        first = call(graph, aten.stack.default, [self.operands[i] for i in behind.init])
        before = call(graph, aten.slice.Tensor, self.value(Stack(behind.base)), 0, 0, trip_count - behind.distance)
        return call(graph, aten.cat.default, [first, before])

    def _loop(self, draft: Draft, operands: Sequence[fx.Node]) -> list[fx.Node]:
        assert draft.body is not None
        loop = Loop(draft.body, len(draft.block.steps), draft.bindings, draft.results)
        outputs, specs = body_outputs(draft.body), []
        for result in loop.results:
            spec = spec_of(outputs[result.output])
            if isinstance(result, Stacked):
                assert isinstance(spec, TensorSpec)
                shape = (loop.trip_count, *spec.shape)
                spec = TensorSpec(shape, spec.dtype, spec.device, dense_stride(shape))
            specs.append(spec)
        calls = (node for node in draft.body.graph.nodes if node.op.startswith("call"))
        site = next((site for site in map(site_of, calls) if site is not None), None)
        graph = self.into.graph
        node = stamp(graph.call_module(self.into.add(loop.kind.value, loop), tuple(operands)), tuple(specs), site)
        return [stamp(graph.call_function(operator.getitem, (node, i)), spec, site) for i, spec in enumerate(specs)]

    def _straight(self, draft: Draft, operands: Sequence[fx.Node]) -> list[fx.Node]:
        """Append the one step of a map as straight code."""
        assert draft.body is not None
        graph, env = self.into.graph, dict[fx.Node, Any]()

        def select(source: fx.Node, scanned: Scanned, index: int) -> fx.Node:
            return call(graph, aten.select.int, source, scanned.dim, index)

        placeholders = (node for node in draft.body.graph.nodes if node.op == "placeholder")
        for node, binding in zip(placeholders, draft.bindings, strict=True):
            if isinstance(binding, Carried):
                raise PassError(f"{node.name}: a map carries nothing")
            env[node] = read_at(binding, 0, operands, (), select)
        for node in draft.body.graph.nodes:
            if node.op not in ("placeholder", "output"):
                env[node] = self.into.copy(node, env, draft.body)
        made: list[fx.Node] = []
        for result in draft.results:
            value = env[body_outputs(draft.body)[result.output]]
            assert isinstance(value, fx.Node)
            stacked = isinstance(result, Stacked)
            made.append(call(graph, aten.stack.default, [value]) if stacked else value)
        return made


def _live_results(node: fx.Node) -> dict[int, list[fx.Node]]:
    """Return the ``getitem`` users of each result of a loop's node."""
    live: dict[int, list[fx.Node]] = {}
    for user in node.users:
        if user.target is not operator.getitem:
            raise PassError(f"{user.name} reads the tuple {node.name} itself, not one of its values")
        live.setdefault(user.args[1], []).append(user)  # type: ignore[arg-type]
    return live


def split_components(module: fx.GraphModule, stack_limit: int) -> tuple[fx.GraphModule, bool]:
    """Return ``module`` with every loop split, and whether any was."""
    into, modified = _Rewriter(module), False
    inner: dict[str, nn.Module] = {}
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op != "call_module":
            if node not in env:
                env[node] = into.graph.node_copy(node, env.__getitem__)
            continue
        target = str(node.target)
        if target not in inner:
            inner[target], changed = _split_inside(module.get_submodule(target), stack_limit)
            modified = modified or changed
        loop = inner[target]
        reason = refusal(loop) if isinstance(loop, Loop) else ""
        if not isinstance(loop, Loop) or reason:
            if isinstance(loop, Loop) and reason != loop.reason:
                logger.info("%s stays whole: %s", node.name, reason)
                inner[target] = loop = loop.with_reason(reason)
                modified = True
            if loop is not module.get_submodule(target):
                into.added[target] = loop
            env[node] = into.graph.node_copy(node, env.__getitem__)
            continue
        live = _live_results(node)
        wanted = Loop(loop.body, loop.trip_count, loop.bindings, [loop.results[i] for i in live])
        distribution = distribute(wanted, tuple(spec_of(n) for n in node.args), stack_limit=stack_limit)
        values = _Emitter(into, Drafts(distribution), [env[n] for n in node.args]).emit()
        for users, value in zip(live.values(), values, strict=True):
            env.update(dict.fromkeys(users, value))
        body = [n for n in loop.body.graph.nodes if n.op != "output"]
        whole = len(distribution.blocks) == 1 and distribution.live.issuperset(body) and len(live) == len(loop.results)
        hoists = any(n.op != "placeholder" for n in distribution.equations.invariant & distribution.live)
        modified = modified or not whole or hoists
    return rebuilt(module, into.graph, into.added), modified


def _split_inside(module: nn.Module, stack_limit: int) -> tuple[nn.Module, bool]:
    """Split the loops inside a submodule or a loop's body."""
    if isinstance(module, fx.GraphModule):
        return split_components(module, stack_limit)
    if isinstance(module, Loop):
        body, modified = split_components(module.body, stack_limit)
        return (Loop(body, module.trip_count, module.bindings, module.results), True) if modified else (module, False)
    return module, False


@dataclass(frozen=True)
class SplitComponents(Pass):
    """Loop distribution.

    Args:
        stack_limit: Bytes that one value, kept for all steps, may take before its small readers join the recurrence
            that makes it.
    """

    name: ClassVar[str] = "split_components"
    stack_limit: int = 1 << 28

    def apply(self, module: fx.GraphModule) -> PassResult:
        """Split every loop."""
        result, modified = split_components(module, self.stack_limit)
        return PassResult(result, modified) if modified else PassResult(module, False)
