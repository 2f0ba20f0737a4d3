"""How what the steps of a sampling loop read is laid out: where that is so at every step, and whether bits depend on it.

The body of a rolled loop carries the specs of one of its steps. A table's tensors may lie otherwise at others: dense at
the first, say, and one element expanded at the rest. What is the same at all steps may be restored after a stack has
packed the steps' values (``fxjacobi.ops.restride``); what is not is left packed, if the bits allow::

    x[:, t] = f(net(x)[:, t]) + values[t]        values = [first, *[torch.zeros(()).expand(n)] * (T - 1)]
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from fxjacobi import ops
from fxjacobi.array_paths import NotAnArrayLoop, Steps, write_chain
from fxjacobi.array_programs import programs
from fxjacobi.assemble import assemble
from fxjacobi.bits import same_bits
from fxjacobi.device.rehearsal import rehearse_call
from fxjacobi.emit import dense_stride
from fxjacobi.equations import body_outputs
from fxjacobi.graph import TensorSpec, spec_of, stamp
from fxjacobi.inline_calls import inline_calls
from fxjacobi.layouts import lie_alike
from fxjacobi.loops import Carried, Invariant, Literal, Loop, Scanned, Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fxjacobi.array_loop import ArrayLoop
    from fxjacobi.array_programs import Programs
    from fxjacobi.causality_proof import CausalityProof

__all__ = ["Repeated", "layout_matters", "others_matter", "packed"]

_log = logging.getLogger(__name__)

_TRIALS = 4


def _other_layouts(loop: Loop, operands: Sequence[object]) -> dict[fx.Node, tuple[TensorSpec, ...]]:
    """Return what the tensors of tables are at each step, by placeholder, where they do not all lie alike.

    Args:
        loop: The loop.
        operands: The arguments of its call, nodes with specs.
    """
    found: dict[fx.Node, tuple[TensorSpec, ...]] = {}
    for node, binding in zip(loop.body.graph.find_nodes(op="placeholder"), loop.bindings, strict=True):
        if not isinstance(binding, Table):
            continue
        arguments = [operands[operand] for operand in binding.operands]
        specs = [spec_of(one) if isinstance(one, fx.Node) else None for one in arguments]
        tensors = tuple(spec for spec in specs if isinstance(spec, TensorSpec))
        if len(tensors) == len(specs) and not all(lie_alike(spec, tensors[0]) for spec in tensors):
            found[node] = tensors
    return found


def packed(loop: Loop, operands: Sequence[object]) -> Loop:
    """Return ``loop`` with a body that says of its placeholders what holds where a stack of all steps is read.

    Tables whose tensors do not lie alike are dense then; the steps by themselves read them as they are, whatever the
    body says. And what is carried lies as the loop is handed it, which need not be how a step hands it on.
    """
    whole = loop.with_body(inline_calls(loop.body, only_single=False))
    body, steps = whole.body, Steps.of(whole)
    specs = {node.name: _dense(table[0]) for node, table in _other_layouts(loop, operands).items()}
    for node, binding in zip(body.graph.find_nodes(op="placeholder"), loop.bindings, strict=True):
        if isinstance(binding, Carried) and not _is_array(whole, node, binding, steps):
            handed, own = operands[binding.init[0]], spec_of(node)
            spec = spec_of(handed) if isinstance(handed, fx.Node) else None
            if isinstance(spec, TensorSpec) and isinstance(own, TensorSpec) and not lie_alike(spec, own):
                specs[node.name] = spec
    if not specs:
        return loop
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in body.graph.nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
        if node.op == "placeholder" and node.name in specs:
            stamp(values[node], specs[node.name])
    return Loop(assemble(graph, body), loop.trip_count, loop.bindings, loop.results, loop.reason)


def _is_array(loop: Loop, node: fx.Node, binding: Carried, steps: Steps) -> bool:
    try:
        return bool(write_chain(body_outputs(loop.body)[binding.output], node, steps))
    except NotAnArrayLoop:
        return False


def _dense(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.shape, spec.dtype, spec.device, dense_stride(spec.shape))


class Repeated:
    """Operands that are expanded: a program that packs them reads one element for all along some dimensions.

    Args:
        structure: A loop, taken apart.
    """

    def __init__(self, structure: ArrayLoop) -> None:
        self._dims: list[tuple[int, int, str]] = []
        for node, binding in structure.bindings.items():
            spec = spec_of(node)
            if not isinstance(spec, TensorSpec) or node is structure.array:
                continue
            for dim in _repeated(spec):
                match binding:
                    case Invariant(operand) | Carried(_, _, (operand, *_)):
                        self._dims.append((operand, dim, node.name))
                    case Scanned(operand, scanned, _):
                        self._dims.append((operand, dim + (dim >= scanned), node.name))
                    case Table(operands):
                        self._dims.extend((operand, dim, node.name) for operand in dict.fromkeys(operands))

    def missing(self, operands: Sequence[Any]) -> str | None:
        """Name an operand that repeats nothing now: the loop was recorded at another step of a loop around it."""
        for operand, dim, name in self._dims:
            value = operands[operand]
            if value.stride(dim) != 0 and not same_bits(value, value.narrow(dim, 0, 1).expand_as(value)):
                return name
        return None


def _repeated(spec: TensorSpec) -> list[int]:
    """Return the dimensions along which one element stands for all."""
    return [dim for dim, (size, step) in enumerate(zip(spec.shape, spec.stride, strict=True)) if step == 0 and size > 1]


def layout_matters(proof: CausalityProof) -> bool:
    """Whether the tail's bits depend on the strides of what it selects, measured on random values.

    A selection ``y[:, t]`` is strided in the ordinary run and contiguous in the collapsed one; some kernels round
    otherwise for the one than for the other (sigmoid on CPUs: vectorised or not).
    """
    steps = proof.structure.trip_count
    laid_out = programs(proof, steps=steps, restrided=True)
    if not any(node.target is ops.restride for node in laid_out.tail.body.graph.nodes):
        return False
    return _differ(programs(proof, steps=steps, restrided=False), laid_out, steps, {}, range(_TRIALS))


def others_matter(proof: CausalityProof, operands: Sequence[object], *, restrided: bool) -> str | None:
    """Name a value whose layout changes from step to step, where the tail's bits depend on it.

    Args:
        proof: The proof of a :func:`packed` loop.
        operands: The arguments of its call, nodes with specs.
        restrided: Whether what lies alike at all steps is laid out as in the ordinary run.
    """
    steps = proof.structure.trip_count
    parts = programs(proof, steps=steps, restrided=restrided)
    read = {one.node for one in parts.inputs}
    others = {node: specs for node, specs in _other_layouts(proof.structure.loop, operands).items() if node in read}
    for node, specs in others.items():
        first = {(spec.shape, spec.stride): step for step, spec in reversed(list(enumerate(specs)))}
        if _differ(parts, parts, steps, {node: specs}, [step for step in first.values() for _ in range(_TRIALS)]):
            return node.name
    return None


def _differ(
    left: Programs,
    right: Programs,
    steps: int,
    layouts: Mapping[fx.Node, Sequence[TensorSpec]],
    trials: Sequence[int] | Any,
) -> bool:
    """Whether two forms of a tail give other bits; the right one reads what is in ``layouts`` as it lies at a step."""
    generator = torch.Generator().manual_seed(0)
    operands = iter(left.inputs)
    entering = [None if isinstance(binding, Literal) else next(operands).node for binding in left.tail.bindings]
    with torch.no_grad():
        for step in trials:
            plain: list[Any] = []
            laid_out: list[Any] = []
            for binding, source in zip(left.tail.bindings, entering, strict=True):
                if source is None:
                    assert isinstance(binding, Literal)
                    plain.append(binding.values[step % steps])
                    laid_out.append(plain[-1])
                    continue
                spec = layouts[source][step] if source in layouts else spec_of(source)
                value = _random(spec, generator)
                plain.append(value)
                laid_out.append(ops.restride(value, spec.stride) if source in layouts else value)  # type: ignore[union-attr]
            if rehearse_call(left.tail.body, plain) is not None:
                return True
            try:
                a, b = left.tail.body(*plain), right.tail.body(*laid_out)
            except (RuntimeError, IndexError, ValueError) as error:
                # Random values may be outside an operation's domain (an index): then nothing was measured.
                _log.debug("layouts are kept, the tail does not run on random values: %s", error)
                return True
            for x, y in zip(a, b, strict=True):
                if isinstance(x, torch.Tensor) and not torch.equal(x.nan_to_num(), y.nan_to_num()):
                    return True
    return False


def _random(spec: object, generator: torch.Generator) -> torch.Tensor:
    """Return random values in dense memory, alike along the dimensions that ``spec`` repeats."""
    assert isinstance(spec, TensorSpec)
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        drawn = torch.randn(spec.shape, generator=generator, dtype=torch.float32) * 2
    else:
        drawn = torch.randint(0, 2, spec.shape, generator=generator)
    for dim in _repeated(spec):
        drawn = drawn.narrow(dim, 0, 1).expand(spec.shape)
    return drawn.contiguous().to(spec.dtype).to(spec.device)
