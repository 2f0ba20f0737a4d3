"""The gradient of many steps that all have the same input: one Jacobian, applied until the adjoint settles.

For ``n`` steps ``y_k = f(x, c)``, every ``x`` of them equal, with adjoint ``l_n = g`` and ``l_{k-1} = J^T l_k``:

    dL/dx = J^T l_1,        dL/dc = (df/dc)^T (l_1 + ... + l_n)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from fxjacobi.loops import Carried, Loop

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["equal_steps"]


class _EqualSteps(torch.autograd.Function):
    """Forward: the values that are known already. Backward: the adjoint of ``count`` equal steps."""

    @staticmethod
    def forward(ctx: Any, loop: Loop, count: int, number: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.loop, ctx.count = loop, count
        arguments, values = tensors[:number], tensors[number:]
        ctx.save_for_backward(*arguments)
        ctx.set_materialize_grads(False)
        results = tuple(value.view_as(value) for value in values)
        ctx.mark_non_differentiable(*(r for r in results if not (r.is_floating_point() or r.is_complex())))
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        loop, count = ctx.loop, ctx.count
        arguments = [a.detach() for a in ctx.saved_tensors]
        wanted = [i for i, a in enumerate(arguments) if a.is_floating_point() or a.is_complex()]
        carried = {i: b.output for i, b in enumerate(loop.bindings) if isinstance(b, Carried) and i in wanted}
        constant = [i for i in wanted if i not in carried]
        for i in wanted:
            arguments[i].requires_grad_()
        with torch.enable_grad():
            outputs = loop.body(*arguments)
        live = {i for i, output in enumerate(outputs) if output.requires_grad}

        def pull(adjoint: dict[int, torch.Tensor], inputs: list[int]) -> dict[int, torch.Tensor]:
            """Apply the transposed Jacobian."""
            if not adjoint or not inputs:
                return {}
            found = torch.autograd.grad(
                [outputs[i] for i in adjoint],
                [arguments[i] for i in inputs],
                list(adjoint.values()),
                retain_graph=True,
                allow_unused=True,
            )
            pulled: dict[int, torch.Tensor | None] = dict(zip(inputs, found, strict=True))
            return {i: g for i, g in pulled.items() if g is not None}

        adjoint = {i: g for i, g in enumerate(gradients) if g is not None and i in live}
        total = dict(adjoint)
        through: dict[int, torch.Tensor] = {}
        for done in range(1, count + 1):
            through = pull(adjoint, list(carried))
            if done == count:
                break
            new: dict[int, torch.Tensor] = {}
            for i, gradient in through.items():
                output = carried[i]
                if output in live:
                    new[output] = new[output] + gradient if output in new else gradient
            if new.keys() == adjoint.keys() and all(torch.equal(new[i], adjoint[i]) for i in new):
                # The adjoint repeats, so the remaining steps add the same again.
                total = {i: total[i] + (count - done) * new.get(i, torch.zeros_like(total[i])) for i in total}
                break
            adjoint = new
            for i, value in adjoint.items():
                total[i] = total[i] + value if i in total else value
            if not any(bool(value.any()) for value in adjoint.values()):
                through = {i: torch.zeros_like(g) for i, g in through.items()}
                break
        results: list[torch.Tensor | None] = [None] * len(arguments)
        for i, gradient in (through | pull(total, constant)).items():
            results[i] = gradient
        return (None, None, None, *results, *[None] * len(gradients))


def equal_steps(
    loop: Loop, count: int, arguments: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Return ``values``, the body's outputs after ``count`` steps that all read ``arguments``, with their gradient.

    Args:
        loop: A fixed-point loop whose carries have distance 1.
        count: The number of steps.
        arguments: The body's arguments, the same at each of them.
        values: The body's outputs, detached.
    """
    apply: Any = _EqualSteps.apply
    results: tuple[torch.Tensor, ...] = apply(loop, count, len(arguments), *arguments, *values)
    return results
