"""A loop that is solved instead of run: the same operands, the same results, and gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._C import _functorch

from fxjacobi.adjoint import Adjoint
from fxjacobi.batched_body import BatchedBody
from fxjacobi.certificate import Certificate, Solution
from fxjacobi.device.form import Explained, Forms
from fxjacobi.device.methods import form_of
from fxjacobi.footprint import solve_bytes
from fxjacobi.loops import Loop, Stacked, Step
from fxjacobi.methods.guess import Base, Guess, Previous
from fxjacobi.methods.sequential import Sequential
from fxjacobi.scripted_loop import run_in_order
from fxjacobi.solve import Solved, lawful, solve_system
from fxjacobi.system import States, System

if TYPE_CHECKING:
    from fxjacobi.batched_body import Batch
    from fxjacobi.methods.method import Contract, Method

__all__ = ["SolvedLoop"]


class SolvedLoop(Explained):
    """A recurrence with the method that solves it.

    Forward: ``s_t = h_t(s_{t-d})`` for all ``t`` under the contract (:func:`fxjacobi.solve.solve`). Backward: the adjoint
    system by the same method (:mod:`fxjacobi.adjoint`), once differentiable. Where the method is not lawful for the
    loop under the contract, the loop runs in order and autograd follows it as it would the original.

    Args:
        loop: The loop.
        method: How to solve it.
        contract: Tolerances and bounds.
        batch: An evaluator of many steps at once that keeps bits, for the exact contract.
        guess: Where sweeps start.
        warm_start: Start from the trajectory of the call before, where its shapes fit.
        memory_limit: Bytes that one batched evaluation may allocate.

    Attributes:
        fuse: Whether captured sweeps may run kernels that Inductor fuses, where that is measured to be faster.
    """

    last: Solution | None
    """Record of the last call."""

    def __init__(
        self,
        loop: Loop,
        method: Method,
        contract: Contract,
        *,
        batch: Batch | None = None,
        guess: Guess | None = None,
        warm_start: bool = False,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__()
        self.loop = loop
        self.method = method
        self.contract = contract
        self.batch = batch
        self.guess: Guess = guess if guess is not None else Base()
        self.warm_start = warm_start
        self.memory_limit = memory_limit
        self.fuse = False
        self.last = None
        self._forms = Forms(lambda runner, device: form_of(self, runner, device))
        self._previous: States | None = None
        self._adjoint: Adjoint | None = None

    def forward(self, *operands: Any) -> tuple[Any, ...]:
        """Solve the loop and return its results."""
        if isinstance(self.method, Sequential) or not lawful(self.method, self.loop, self.contract):
            self.last = Solution(0, Certificate.SEQUENTIAL, 0.0, (), self.loop.trip_count)
            return run_in_order(self.loop, operands)
        if torch.is_grad_enabled() and any(isinstance(o, torch.Tensor) and o.requires_grad for o in operands):
            found: tuple[Any, ...] = _Solve.apply(self, *operands)  # type: ignore[no-untyped-call]
            return found
        form = self._forms.of(operands)
        captured = None if form is None else form(operands)
        if captured is not None:
            results, self.last = captured
            return results
        system, solved = self._solve(operands)
        results = system.results(solved.states, solved.others)
        if form is not None:
            form.adopt(system.operands, results)
        return results

    @property
    def memory_bytes(self) -> int | None:
        """Estimated peak memory of a solve beyond its operands; ``None`` where the loop runs in order."""
        if isinstance(self.method, Sequential) or not lawful(self.method, self.loop, self.contract):
            return None
        return solve_bytes(self.loop, self.method, self.memory_limit)

    def forget(self) -> None:
        """Start the next call without what the calls before left behind (:attr:`warm_start`)."""
        self._previous = None
        if self._adjoint is not None:
            self._adjoint.previous = None

    @torch.no_grad()
    def _solve(self, operands: tuple[Any, ...]) -> tuple[System, Solved]:
        system = System(self.loop, operands, batch=self.batch, memory_limit=self.memory_limit)
        warm = self.warm_start and self._previous is not None
        guess = Previous(self._previous) if warm and self._previous is not None else self.guess
        solved = solve_system(system, self.method, self.contract, guess)
        self.last = solved.solution
        if self.warm_start:
            self._previous = tuple(s.detach() for s in solved.states)
        return system, solved

    def _gradients(
        self, operands: tuple[Any, ...], states: States, given: tuple[torch.Tensor | None, ...]
    ) -> list[torch.Tensor | None]:
        """Return the operands' gradients from those of the results."""
        if self._adjoint is None:
            with torch.no_grad():
                self._adjoint = Adjoint(self.loop, operands)
        adjoint, steps = self._adjoint, self.loop.trip_count
        cotangents: dict[int, torch.Tensor] = {}
        specs = BatchedBody.of(self.loop).output_specs
        for output in adjoint.outputs:
            spec: Any = specs[output]
            cotangents[output] = torch.zeros((steps, *spec.shape), dtype=spec.dtype, device=spec.device)
        for result, gradient in zip(self.loop.results, given, strict=True):
            if gradient is None or result.output not in cotangents:
                continue
            match result:
                case Step(output, step):
                    # Out of place: under vmap a gradient has a dimension that the zeros have not.
                    at = torch.tensor([step], device=gradient.device)
                    cotangents[output] = cotangents[output].index_add(0, at, gradient.unsqueeze(0))
                case Stacked(output):
                    cotangents[output] = cotangents[output] + gradient
        adjoint.warm_start = self.warm_start
        return adjoint.gradients(operands, states, cotangents, self.method, self.contract, self.memory_limit)


_ONCE = (
    "the gradient of a solved recurrence is itself a solve, which is differentiated once only; "
    "for second derivatives compile without a tolerance (rtol=0, atol=0), or call the original model"
)


_BATCHED = (
    "gradients of a solved recurrence cannot be batched (vectorize=True, is_grads_batched=True, vmap): "
    "take them one after another (vectorize=False), or compile without a tolerance (rtol=0, atol=0)"
)


class _Solve(torch.autograd.Function):
    """The solve as one differentiable operation of the operands."""

    @staticmethod
    def forward(ctx: Any, module: SolvedLoop, *operands: Any) -> tuple[Any, ...]:
        system, solved = module._solve(operands)
        results = tuple(_own(r) for r in system.results(solved.states, solved.others))
        ctx.module = module
        ctx.others = [None if isinstance(o, torch.Tensor) else o for o in operands]
        ctx.is_tensor = [isinstance(o, torch.Tensor) for o in operands]
        ctx.save_for_backward(*(o for o in operands if isinstance(o, torch.Tensor)), *solved.states)
        whole = [r for r in results if isinstance(r, torch.Tensor) and not (r.is_floating_point() or r.is_complex())]
        ctx.mark_non_differentiable(*whole)
        return results

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        # A solve looks at its values, which vmap hides.
        if any(
            g is not None and (_functorch.is_batchedtensor(g) or _functorch.is_legacy_batchedtensor(g)) for g in given
        ):
            raise RuntimeError(_BATCHED)
        again = torch.is_grad_enabled()  # create_graph=True
        saved = list(ctx.saved_tensors)
        operands = tuple(
            saved.pop(0) if is_tensor else other for is_tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)
        )
        with torch.enable_grad():  # the batched products need it
            gradients = ctx.module._gradients(operands, tuple(saved), given)
        if again:  # whoever differentiates these learns why that cannot be
            # What was given goes through as well: who differentiates by it must come upon the error, and find no zeros.
            passed = [*(None if g is None else g.detach().requires_grad_() for g in gradients), *given]
            stop: Any = torch._C._functions.DelayedError(_ONCE, len(passed))
            gradients = list(stop(*passed))[: len(gradients)]
        return (None, *gradients)


def _own(value: Any) -> Any:
    """Return a tensor that shares no storage with another result, as autograd wants outputs."""
    return value.clone() if isinstance(value, torch.Tensor) else value
