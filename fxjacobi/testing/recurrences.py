"""Recurrences as loops, built by hand: the cells that tests of the solver family run on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxjacobi.graph import stamp_all
from fxjacobi.loops import Binding, Carried, Invariant, Literal, Loop, Result, Scanned, Stacked, Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Recurrence", "affine_dense", "affine_diagonal", "autoregressive", "gru", "lstm", "rnn", "traced_body"]


@dataclass(frozen=True)
class Recurrence:
    """A loop with operands to call it on."""

    loop: Loop
    operands: tuple[Any, ...]

    def reference(self) -> tuple[torch.Tensor, ...]:
        """Return the loop's results, run in order."""
        return self.loop(*self.operands)  # type: ignore[no-any-return]


def traced_body(step: Callable[..., tuple[torch.Tensor, ...]], arguments: Sequence[Any]) -> fx.GraphModule:
    """Trace one step into a stamped body; an argument that is no tensor stays a placeholder."""
    if all(isinstance(a, torch.Tensor) for a in arguments):
        body = make_fx(step)(*arguments)
    else:
        body = fx.symbolic_trace(step)
    stamp_all(body, arguments)
    return body


def _inputs(steps: int, batch: int, size: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, batch, size, generator=generator, dtype=torch.float64).to(dtype), generator


def _weights(
    shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, scale: float = 1.0
) -> torch.Tensor:
    # Drawn in float64 and rounded to float32, so that a float32 recurrence and its float64 twin hold the same weights.
    uniform: torch.Tensor = torch.rand(shape, generator=generator, dtype=torch.float64)
    bound = float(shape[-1]) ** -0.5 * scale
    weights: torch.Tensor = (uniform * (2 * bound) - bound).float()
    return weights.to(dtype)


def rnn(
    steps: int, batch: int, size: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Recurrence:
    """``h_t = tanh(W h_{t-1} + x_t)`` with ``W`` of spectral radius ``scale``: chaotic past 1."""
    x, generator = _inputs(steps, batch, size, torch.float32, seed)
    weights = torch.randn(size, size, generator=generator, dtype=torch.float64)
    weights = (weights * scale / torch.linalg.eigvals(weights).abs().max()).float().to(dtype)
    operands = (torch.zeros(batch, size, dtype=dtype), (0.1 * x).to(dtype), weights)

    def step(h: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.tanh(torch.ops.aten.mm(h, w.t()) + x),)

    body = traced_body(step, (operands[0], operands[1][0], operands[2]))
    bindings: list[Binding] = [Carried(0, 1, (0,)), Scanned(1, 0, range(steps)), Invariant(2)]
    return Recurrence(Loop(body, steps, bindings, [Stacked(0), Step(0, steps - 1)]), operands)


def gru(
    steps: int, batch: int, size: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Recurrence:
    """A GRU cell, its input projection done before the loop (as splitting leaves it); recurrent weights times ``scale``."""
    x, generator = _inputs(steps, batch, 3 * size, torch.float32, seed)
    weights = _weights((3 * size, size), generator, dtype, scale)
    bias = _weights((3 * size,), generator, dtype)
    operands = (torch.zeros(batch, size, dtype=dtype), x.to(dtype), weights, bias)

    def step(h: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        reset, update, new = torch.nn.functional.linear(h, w, b).chunk(3, -1)
        x_reset, x_update, x_new = x.chunk(3, -1)
        candidate = torch.tanh(x_new + torch.sigmoid(x_reset + reset) * new)
        return (candidate + torch.sigmoid(x_update + update) * (h - candidate),)

    body = traced_body(step, (operands[0], operands[1][0], *operands[2:]))
    bindings: list[Binding] = [Carried(0, 1, (0,)), Scanned(1, 0, range(steps)), Invariant(2), Invariant(3)]
    return Recurrence(Loop(body, steps, bindings, [Stacked(0), Step(0, steps - 1)]), operands)


def lstm(
    steps: int, batch: int, size: int, *, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Recurrence:
    """An LSTM cell with two carries, and the output gate as a result that is no state."""
    x, generator = _inputs(steps, batch, 4 * size, torch.float32, seed)
    weights = _weights((4 * size, size), generator, dtype, scale)
    zeros = torch.zeros(batch, size, dtype=dtype)
    operands = (zeros, zeros.clone(), x.to(dtype), weights)

    def step(h: torch.Tensor, c: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        i, f, g, o = (torch.nn.functional.linear(h, w) + x).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        gate = torch.sigmoid(o)
        return gate * torch.tanh(c), c, gate

    body = traced_body(step, (operands[0], operands[1], operands[2][0], operands[3]))
    bindings: list[Binding] = [Carried(0, 1, (0,)), Carried(1, 1, (1,)), Scanned(2, 0, range(steps)), Invariant(3)]
    return Recurrence(Loop(body, steps, bindings, [Stacked(0), Stacked(2), Step(1, steps - 1)]), operands)


def affine_diagonal(
    steps: int, batch: int, size: int, *, distance: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Recurrence:
    """``s_t = (1 - z_t) s_{t-d} + z_t x_t`` (minGRU, arXiv 2410.01201)."""
    x, generator = _inputs(steps, batch, size, torch.float32, seed)
    z = torch.rand(steps, batch, size, generator=generator)
    starts = [torch.randn(batch, size, generator=generator).to(dtype) for _ in range(distance)]
    operands = (*starts, x.to(dtype), z.to(dtype))

    def step(s: torch.Tensor, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ((1 - z) * s + z * x,)

    body = traced_body(step, (starts[0], x[0].to(dtype), z[0].to(dtype)))
    bindings: list[Binding] = [
        Carried(0, distance, tuple(range(distance))),
        Scanned(distance, 0, range(steps)),
        Scanned(distance + 1, 0, range(steps)),
    ]
    return Recurrence(Loop(body, steps, bindings, [Stacked(0)]), operands)


def affine_dense(steps: int, batch: int, size: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Recurrence:
    """``s_t = s_{t-1} A_t + x_t`` with a dense ``A_t`` of norm below one."""
    x, generator = _inputs(steps, batch, size, torch.float32, seed)
    a = torch.randn(steps, size, size, generator=generator) * 0.5 * size**-0.5
    operands = (torch.zeros(batch, size, dtype=dtype), x.to(dtype), a.to(dtype))

    def step(s: torch.Tensor, x: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.ops.aten.mm(s, a) + x,)

    body = traced_body(step, (operands[0], operands[1][0], operands[2][0]))
    bindings: list[Binding] = [Carried(0, 1, (0,)), Scanned(1, 0, range(steps)), Scanned(2, 0, range(steps))]
    return Recurrence(Loop(body, steps, bindings, [Stacked(0)]), operands)


def autoregressive(
    steps: int, batch: int, size: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Recurrence:
    """``s_t = sin(0.6 s_{t-1} - 0.3 s_{t-3} c_t) + x_{T-1-t}``: two distances, a literal that varies, read backwards."""
    x, generator = _inputs(steps, batch, size, torch.float32, seed)
    starts = [torch.randn(batch, size, generator=generator).to(dtype) for _ in range(3)]
    operands = (*starts, x.to(dtype))

    def step(near: Any, far: Any, x: Any, c: Any) -> tuple[Any, ...]:
        aten = torch.ops.aten
        weighted = aten.mul.Tensor(aten.mul.Tensor(far, 0.3), c)
        return (aten.add.Tensor(aten.sin.default(aten.sub.Tensor(aten.mul.Tensor(near, 0.6), weighted)), x),)

    body = traced_body(step, (starts[0], starts[1], operands[3][0], 0.5))
    bindings: list[Binding] = [
        Carried(0, 1, (2,)),
        Carried(0, 3, (0, 1, 2)),
        Scanned(3, 0, range(steps - 1, -1, -1)),
        Literal(tuple(0.1 * (t % 10) for t in range(steps))),
    ]
    results: list[Result] = [Stacked(0), Step(0, steps // 2)]
    return Recurrence(Loop(body, steps, bindings, results), operands)
