"""Hypothesis networks of the operations that the causal-rank analysis has rules for, recorded in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hypothesis import strategies as st
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from fxjacobi.graph import stamp_all
from tests.properties.drawn import Drawn, Layer
from tests.properties.more_layers import more_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Program", "networks"]


def _layer(  # noqa: C901 - one option after another
    drawn: Drawn, shape: Sequence[int], constants: list[torch.Tensor]
) -> tuple[str, Layer]:
    """Draw one layer for a tensor of ``shape``; it reads ``constants`` by number when it runs."""
    dims = len(shape)
    pick, add = drawn.pick, drawn.add
    dim = drawn.draw(st.integers(-dims, dims - 1))
    size = shape[dim]

    def c(number: int) -> torch.Tensor:
        return constants[number]

    makers: dict[str, Callable[[], Layer]] = {}

    def option(name: str, *, when: bool = True) -> Callable[[Callable[[], Layer]], None]:
        def put(maker: Callable[[], Layer]) -> None:
            if when:
                makers[name] = maker

        return put

    @option("pointwise")
    def _() -> Layer:
        f = pick(torch.tanh, torch.relu, torch.sigmoid, functional.elu, functional.gelu, torch.neg)
        return lambda x: f(x) * 1.5 + 0.25

    @option("multiply by a mask")
    def _() -> Layer:
        m = add(drawn.mask(*shape))
        return lambda x: x * c(m)

    @option("where")
    def _() -> Layer:
        m, other = add(drawn.mask(*shape) > 0), add(drawn.random(*shape))
        return lambda x: torch.where(c(m), x.tanh(), c(other))

    @option("masked softmax")
    def _() -> Layer:
        mask = drawn.mask(*shape)
        mask.select(dim, 0).fill_(1)  # a row of nothing but -inf is NaN, which voids any proof at run time
        m = add(mask)
        how = pick("fill", "add")
        log = pick(True, False)

        def run(x: torch.Tensor) -> torch.Tensor:
            if how == "fill":
                x = x.masked_fill(c(m) == 0, -torch.inf)
            else:
                x = x + torch.zeros_like(x).masked_fill(c(m) == 0, -torch.inf)
            return x.log_softmax(dim).exp() if log else x.softmax(dim)

        return run

    @option("finite mask")
    def _() -> Layer:
        mask = drawn.mask(*shape)
        mask.select(dim, 0).fill_(1)
        m, low = add(mask), pick(-1e9, -1e4, -900.0, -80.0, torch.finfo(torch.float64).min)
        how, squashed = pick("fill", "add", "where", "multiply"), pick(True, False)

        def run(x: torch.Tensor) -> torch.Tensor:
            x = x.tanh() if squashed else x
            if how == "fill":
                x = x.masked_fill(c(m) == 0, low)
            elif how == "add":
                x = x / 2 + (1 - c(m)) * low
            elif how == "where":
                x = torch.where(c(m) > 0, x, torch.full_like(c(m), low))
            else:
                x = x * c(m) - (1 - c(m)) * -low
            return x.softmax(dim)

        return run

    @option("linear")
    def _() -> Layer:
        out = pick(2, 3, 4)
        w, m = add(drawn.random(out, shape[-1])), add(drawn.mask(out, shape[-1]))
        b = add(drawn.random(out))
        return lambda x: functional.linear(x, c(w) * c(m), c(b))

    @option("mix rows", when=dims >= 2)
    def _() -> Layer:
        a = add(drawn.random(shape[-2], shape[-2]) * drawn.mask(shape[-2], shape[-2]))
        return lambda x: c(a) @ x

    @option("attend", when=dims >= 2)
    def _() -> Layer:
        m = add(drawn.mask(shape[-2], shape[-2]).fill_diagonal_(1))

        def run(x: torch.Tensor) -> torch.Tensor:
            scores = (x @ x.transpose(-1, -2)).masked_fill(c(m) == 0, -torch.inf)
            return scores.softmax(-1).nan_to_num() @ x

        return run

    @option("einsum", when=dims == 3)
    def _() -> Layer:
        a = add(drawn.random(shape[1], shape[1]) * drawn.mask(shape[1], shape[1]))
        return lambda x: torch.einsum("btd,ut->bud", x, c(a))

    @option("fused attention", when=dims in (3, 4))
    def _() -> Layer:
        kind = pick("causal", "mask", "bool", "none", "finite")
        m, low = add(drawn.mask(shape[-2], shape[-2])), pick(-1e9, -1e4, -900.0, -80.0)
        squashed = pick(True, False)

        def run(x: torch.Tensor) -> torch.Tensor:
            x = x.tanh() if squashed else x
            x4 = x if x.dim() == 4 else x.unsqueeze(1)
            mask: torch.Tensor | None = None
            if kind == "mask":
                mask = torch.zeros_like(c(m)).masked_fill(c(m) == 0, -torch.inf)
            elif kind == "bool":
                mask = c(m) > 0
            elif kind == "finite":
                mask = (1 - c(m)) * low
            y = functional.scaled_dot_product_attention(
                x4, x4 * 0.5, x4 + 1, attn_mask=mask, is_causal=kind == "causal"
            )
            return y if x.dim() == 4 else y.squeeze(1)

        return run

    @option("conv1d", when=dims == 3)
    def _() -> Layer:
        out, k, groups = pick(2, 4), pick(1, 2, 3), 2 if shape[1] % 2 == 0 and pick(True, False) else 1
        stride, dilation = pick(1, 2), pick(1, 2)
        w = add(drawn.random(out, shape[1] // groups, k) * drawn.mask(out, shape[1] // groups, k))
        pad = dilation * (k - 1)
        return lambda x: functional.conv1d(x, c(w), stride=stride, padding=pad, dilation=dilation, groups=groups)

    @option("conv2d", when=dims == 4)
    def _() -> Layer:
        out, k, groups = pick(2, 4), pick((1, 1), (2, 3), (3, 3)), 2 if shape[1] % 2 == 0 and pick(True, False) else 1
        w = add(drawn.random(out, shape[1] // groups, *k) * drawn.mask(out, shape[1] // groups, *k))
        stride = pick(1, 2)
        return lambda x: functional.conv2d(x, c(w), stride=stride, padding=(k[0] - 1, k[1] // 2), groups=groups)

    @option("transposed conv", when=dims in (3, 4))
    def _() -> Layer:
        groups = 2 if shape[1] % 2 == 0 and pick(True, False) else 1
        k, stride, dilation = pick(1, 2, 3), pick(1, 2), pick(1, 2)
        kernel = (k,) * (dims - 2)
        w = add(drawn.random(shape[1], 2, *kernel) * drawn.mask(shape[1], 2, *kernel))
        f = functional.conv_transpose1d if dims == 3 else functional.conv_transpose2d
        extra = stride - 1
        pad = pick(0, min(1, dilation * (k - 1)))
        return lambda x: f(x, c(w), None, stride, pad, extra, groups, dilation)

    @option("pool", when=dims in (3, 4) and min(shape[2:], default=0) >= 2)
    def _() -> Layer:
        f = {3: (functional.max_pool1d, functional.avg_pool1d), 4: (functional.max_pool2d, functional.avg_pool2d)}[dims]
        chosen, stride, pad = f[pick(0, 1)], pick(1, 2), pick(0, 1)
        return lambda x: chosen(x, 2, stride, pad)

    @option("pad")
    def _() -> Layer:
        amounts = [pick(0, 1, 2), pick(0, 1)] * min(dims, 2)
        return lambda x: functional.pad(x, amounts)

    @option("shift")
    def _() -> Layer:
        amount = pick(1, -1)
        return lambda x: torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x.narrow(dim, 0, size - 1)], dim) if (
            amount > 0
        ) else x.roll(1, dim)  # fmt: skip

    @option("slice", when=size >= 2)
    def _() -> Layer:
        start, step = pick(0, 1), pick(1, 2)
        return lambda x: x.movedim(dim, 0)[start::step].movedim(0, dim)

    @option("reorder")
    def _() -> Layer:
        how = pick("flip", "transpose", "reshape", "repeat", "stack", "tril", "split")
        if how == "transpose":
            return lambda x: x.transpose(0, -1).contiguous()
        if how == "reshape":
            return lambda x: x.reshape(x.shape[0], -1)
        if how == "repeat":
            return lambda x: torch.cat([x, x.flip(dim)], dim)
        if how == "stack":
            return lambda x: torch.stack([x, x * 2], -1).flatten(-2)
        if how == "tril" and dims >= 2:
            return lambda x: x.tril(-1) + 0.5
        if how == "split":
            return lambda x: torch.cat(list(x.split(1, dim))[::-1], dim)
        return lambda x: x.flip(dim)

    @option("scan")
    def _() -> Layer:
        f = pick(torch.cumsum, torch.logcumsumexp, lambda x, d: x.cummax(d).values)
        return lambda x: f(x, dim) / 4

    @option("reduce")
    def _() -> Layer:
        f = pick(
            lambda x: x.sum(dim, keepdim=True), lambda x: x.amax(dim, keepdim=True), lambda x: x.mean(dim, keepdim=True),
            lambda x: x.logsumexp(dim, keepdim=True), lambda x: x.max(dim, keepdim=True).values,
            lambda x: x.argmax(dim, keepdim=True).double(), lambda x: x.std(dim, keepdim=True, correction=0),
        )  # fmt: skip
        return lambda x: x + f(x)

    @option("sort")
    def _() -> Layer:
        k = min(2, size)
        how = pick(lambda x: x.sort(dim).values, lambda x: x.topk(k, dim).values, lambda x: x.argsort(dim).double())
        chosen: Layer = how
        return chosen

    @option("layer norm")
    def _() -> Layer:
        return lambda x: functional.layer_norm(x, x.shape[-1:])

    @option("group norm", when=dims >= 3 and shape[1] % 2 == 0)
    def _() -> Layer:
        return lambda x: functional.group_norm(x, 2)

    @option("batch norm", when=dims >= 2 and shape[0] * shape[-1] > 2)
    def _() -> Layer:
        training = pick(True, False) and shape[0] > 1
        mean, var = add(torch.zeros(shape[1], dtype=torch.float64)), add(torch.ones(shape[1], dtype=torch.float64))
        if training:
            return lambda x: functional.batch_norm(x, None, None, training=True)
        return lambda x: functional.batch_norm(x, c(mean), c(var))

    @option("index", when=size >= 2)
    def _() -> Layer:
        index = add(
            torch.randint(0, size, (3,), generator=torch.Generator().manual_seed(drawn.draw(st.integers(0, 99))))
        )
        how = pick("index_select", "index", "gather", "put", "scatter")

        def run(x: torch.Tensor) -> torch.Tensor:
            i = c(index)
            moved = x.movedim(dim, 0)
            if how == "index_select":
                return x.index_select(dim, i)
            if how == "index":
                return moved[i].movedim(0, dim)
            if how == "gather":
                return moved.gather(0, i.view(-1, *[1] * (dims - 1)).expand(3, *moved.shape[1:])).movedim(0, dim)
            if how == "put":
                return moved.index_put((i,), moved[:1].tanh()).movedim(0, dim)
            j = i.view(-1, *[1] * (dims - 1)).expand(3, *moved.shape[1:])
            return moved.scatter(0, j, moved.gather(0, j).tanh()).movedim(0, dim)

        return run

    @option("embed")
    def _() -> Layer:
        table = add(drawn.random(5, 2))
        how = pick("embedding", "index", "one_hot", "bucketize")
        edges = torch.linspace(-1, 1, 4, dtype=torch.float64)
        e = add(edges, known=True)

        def run(x: torch.Tensor) -> torch.Tensor:
            tokens = (x.tanh() * 2 + 2.5).floor().long().clamp(0, 4)
            if how == "embedding":
                return functional.embedding(tokens, c(table)).flatten(-2)
            if how == "index":
                return c(table)[tokens].flatten(-2)
            if how == "bucketize":
                return torch.bucketize(x, c(e)).double() + x
            hot = torch.zeros(*x.shape, 5, dtype=torch.float64).scatter(-1, tokens.unsqueeze(-1), 1.0)
            return hot @ c(table)[:, :1].squeeze(-1)

        return run

    more_layers(drawn, shape, dim, c, option)
    name = drawn.draw(st.sampled_from(sorted(makers)))
    return name, makers[name]()


@dataclass
class Program:
    module: fx.GraphModule
    start: torch.Tensor
    rank: torch.Tensor
    constants: list[torch.Tensor]
    known: list[bool]
    names: list[str]


@st.composite
def networks(draw: Any) -> Program:
    shape = draw(st.sampled_from([(2, 5), (2, 3, 2), (1, 2, 5), (1, 2, 3, 3), (3, 4)]))
    drawn = Drawn(draw)
    layers: list[Layer] = []
    constants: list[torch.Tensor] = drawn.values
    start = drawn.random(*shape)
    value = start
    for _ in range(draw(st.integers(1, 4))):
        if value.numel() > 200 or value.dim() == 0:
            break
        name, layer = _layer(drawn, value.shape, constants)
        drawn.names.append(name)
        value = layer(value)
        layers.append(layer)
    values = list(constants)

    def run(x: torch.Tensor, *given_constants: torch.Tensor) -> torch.Tensor:
        constants[:] = given_constants
        for layer in layers:
            x = layer(x)
        return x

    module = make_fx(run)(start, *values)

    with torch.no_grad():
        stamp_all(module, [start, *values])
    # The batch is written together, as samplers do, or every element by itself; some positions are never written.
    positions = torch.arange(start[0].numel() if draw(st.booleans()) else start.numel())
    order = torch.tensor(draw(st.permutations(range(len(positions)))))
    rank = (
        order.reshape(start.shape)
        if len(positions) == start.numel()
        else order.reshape(1, *start.shape[1:]).expand_as(start)
    )
    unwritten = draw(st.integers(0, 2))
    rank = torch.where(rank < len(positions) - unwritten, rank, -1).to(torch.int32)
    return Program(module, start, rank, values, drawn.known, drawn.names)
