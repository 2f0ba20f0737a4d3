"""Further layers for the networks of :mod:`tests.properties.causal_networks`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from hypothesis import strategies as st
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.properties.drawn import Drawn, Layer

__all__ = ["more_layers"]


def more_layers(  # noqa: C901 - one option after another
    drawn: Drawn,
    shape: Sequence[int],
    dim: int,
    c: Callable[[int], torch.Tensor],
    option: Callable[..., Callable[[Callable[[], Layer]], None]],
) -> None:
    """Offer the layers that fit a tensor of ``shape``."""
    dims, size = len(shape), shape[dim]
    pick, add = drawn.pick, drawn.add

    def places(count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(drawn.draw(st.integers(0, 99)))
        return torch.randint(0, size, (count,), generator=generator)

    def along(index: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        placed = [1] * dims
        placed[dim] = -1
        sizes = list(like.shape)
        sizes[dim] = len(index)
        return index.view(placed).expand(sizes)

    @option("matrix products", when=dims in (2, 3))
    def _() -> Layer:
        w = add(drawn.random(shape[-1], 3) * drawn.mask(shape[-1], 3))
        b, v = add(drawn.random(3)), add(drawn.random(shape[-1]) * (drawn.random(shape[-1]) > 0))
        how = pick("addmm", "baddbmm", "vector", "beta", "gram")

        def run(x: torch.Tensor) -> torch.Tensor:
            if how == "vector":
                return x @ c(v) if dims == 2 else torch.einsum("btd,d->bt", x, c(v))
            if how == "gram":
                return x @ x.mT / 4
            if dims == 2:
                return torch.addmm(c(b), x, c(w), beta=0.5 if how == "beta" else 1, alpha=2 if how == "beta" else 1)
            batched = c(w).expand(x.shape[0], *c(w).shape)
            return torch.baddbmm(c(b), x, batched) if how == "baddbmm" else torch.bmm(x, batched)

        return run

    @option("einsum forms", when=dims in (2, 3))
    def _() -> Layer:
        a = add(drawn.random(shape[-1], shape[-1]) * drawn.mask(shape[-1], shape[-1]))
        forms = ["bi,ij->bj", "bi,ij->ib", "bi,ij->b"] if dims == 2 else ["bti,ij->btj", "bti,ij->jtb", "bti,ij->tj"]
        form = pick(*forms)
        return lambda x: torch.einsum(form, x, c(a))

    @option("vary convolutions", when=dims == 4)
    def _() -> Layer:
        k, dilation = pick((1, 2), (2, 2), (3, 1)), pick(1, 2)
        w = add(drawn.random(2, shape[1], *k) * drawn.mask(2, shape[1], *k))
        b = add(drawn.random(2))
        pad = [dilation * (n - 1) for n in k]
        if pick(True, False):
            return lambda x: functional.conv3d(x[:, :, None], c(w)[:, :, None], c(b), padding=(0, *pad), dilation=(1, dilation, dilation))[:, :, 0]  # fmt: skip
        return lambda x: functional.conv2d(x, c(w), c(b), padding=pad, dilation=dilation)

    @option("vary pools", when=dims in (3, 4) and min(shape[2:], default=0) >= 2)
    def _() -> Layer:
        average = functional.avg_pool1d if dims == 3 else functional.avg_pool2d
        largest = functional.max_pool1d if dims == 3 else functional.max_pool2d
        adaptive = functional.adaptive_avg_pool1d if dims == 3 else functional.adaptive_avg_pool2d
        how = pick("ceil", "dilated", "adaptive", "uneven")
        if how == "ceil":
            return lambda x: average(x, 2, 2, 1, True, False)
        if how == "dilated":
            return lambda x: largest(x, 2, 1, 1, 2 if min(x.shape[2:]) > 2 else 1)
        if how == "uneven":
            return lambda x: average(x, (2,) if dims == 3 else (2, 1), 1)
        return lambda x: adaptive(x, 2)

    @option("vary norms")
    def _() -> Layer:
        g, b = add(drawn.random(shape[-1])), add(drawn.random(shape[-1]))
        how = pick("affine", "rms", "instance", "vector", "all")
        if how == "affine":
            return lambda x: functional.layer_norm(x, x.shape[-1:], c(g), c(b))
        if how == "rms":
            return lambda x: functional.rms_norm(x, x.shape[-1:], c(g))
        if how == "instance" and dims in (3, 4) and shape[-1] > 1:
            return functional.instance_norm
        if how == "vector":
            return lambda x: x / (1 + x.norm(dim=dim, keepdim=True))
        return lambda x: functional.layer_norm(x, x.shape[1:]) if x[0].numel() > 1 else x

    @option("vary reductions")
    def _() -> Layer:
        chosen: Callable[[torch.Tensor], torch.Tensor] = pick(
            lambda x: x.prod(dim, keepdim=True), lambda x: x.var(dim, keepdim=True, correction=0),
            lambda x: x.amin(dim, keepdim=True), lambda x: (x > 0).any(dim, keepdim=True).double(),
            lambda x: (x > 0).all(dim, keepdim=True).double(), lambda x: x.median(dim, keepdim=True).values,
            lambda x: x.kthvalue(1, dim, keepdim=True).values, lambda x: x.norm(p=1, dim=dim, keepdim=True),
            lambda x: torch.var_mean(x, dim, keepdim=True, correction=0)[1], lambda x: x.sum(), lambda x: x.max(),
            lambda x: x.min(dim, keepdim=True).indices.double(), lambda x: x.count_nonzero(dim).double().unsqueeze(dim),
        )  # fmt: skip
        return lambda x: x - chosen(x) / 3

    @option("vary scans")
    def _() -> Layer:
        how: Layer = pick(
            lambda x: x.cumprod(dim), lambda x: x.cummin(dim).values, lambda x: x.cummax(dim).indices.double() + x / 9,
            lambda x: x.flip(dim).cumsum(dim).flip(dim) / 3, lambda x: x.diff(dim=dim) if size > 1 else x,
        )  # fmt: skip
        return how

    @option("constant indices", when=size >= 2)
    def _() -> Layer:
        i, how = (
            add(places(3)),
            pick("add", "copy", "fill", "scatter_add", "scatter_value", "put", "put one", "take", "pairs", "bools"),
        )
        unique = add(torch.tensor([size - 1, 0]))

        def run(x: torch.Tensor) -> torch.Tensor:
            part = x.narrow(dim, 0, 1).tanh()
            three = part.expand(*(3 if d == dim % dims else n for d, n in enumerate(x.shape)))
            if how == "add":
                return x.index_add(dim, c(i), three)
            if how == "copy":
                return x.index_copy(dim, c(unique), x.narrow(dim, 0, 2).tanh())
            if how == "fill":
                return x.index_fill(dim, c(i), 0.5)
            if how == "scatter_add":
                return x.scatter_add(dim, along(c(i), x), three.contiguous())
            if how == "scatter_value":
                return x.scatter(dim, along(c(i), x), 2.0)
            if how == "put":
                moved = x.movedim(dim, 0)
                return moved.index_put((c(i),), moved[:1].tanh().expand(3, *moved.shape[1:]), accumulate=True).movedim(
                    0, dim
                )
            if how == "put one":
                moved = x.movedim(dim, 0)
                return moved.index_put((c(i)[:2],), moved[:2].tanh()).movedim(0, dim)
            if how == "take":
                return x.take_along_dim(along(c(i), x), dim)
            if how == "pairs":
                return x.movedim(dim, 0)[c(i)[:, None], torch.zeros_like(c(i))[None, :2]] if dims > 1 else x[c(i)]
            return x.movedim(dim, 0)[torch.arange(size) != size - 1].movedim(0, dim)

        return run

    @option("indices from data")
    def _() -> Layer:
        how = pick("gather", "select", "put", "scatter", "sort and search")

        def run(x: torch.Tensor) -> torch.Tensor:
            order = x.argsort(dim)
            if how == "gather":
                return x.gather(dim, order)
            if how == "select":
                return x.index_select(dim, order.flatten()[:2] % size)
            if how == "put":
                moved = x.movedim(dim, 0)
                return moved.index_put((order.flatten()[:1] % size,), moved[:1].tanh()).movedim(0, dim)
            if how == "scatter":
                return torch.zeros_like(x).scatter(dim, order, x)
            rows = x.sort(-1).values
            return torch.searchsorted(rows.contiguous(), x.contiguous()).double() + x / 8

        return run

    @option("one-hot forms")
    def _() -> Layer:
        table = add(drawn.random(4, 2))
        how = pick("eq", "where")

        def run(x: torch.Tensor) -> torch.Tensor:
            tokens = (x.tanh() * 2 + 2).floor().long().clamp(0, 3)
            if how == "eq":
                hot = tokens.unsqueeze(-1) == torch.arange(4)
            else:
                hot = torch.where(tokens.unsqueeze(-1) == torch.arange(4), 1, 0)
            return (hot.double() @ c(table)).flatten(-2)

        return run

    @option("vary views")
    def _() -> Layer:
        even = size % 2 == 0
        how = pick("glu", "unfold", "reflect", "repeat", "diagonal", "scatter views", "tile", "halves", "masks")
        m = add(drawn.mask(*shape) > 0)

        def run(x: torch.Tensor) -> torch.Tensor:
            if how == "glu" and even:
                return functional.glu(x, dim)
            if how == "unfold" and size >= 2:
                return x.unfold(dim, 2, 1).sum(-1)
            if how == "reflect" and dims == 3 and shape[-1] >= 2:
                return functional.pad(x, (1, 1), mode="reflect")
            if how == "repeat":
                return x.repeat_interleave(2, dim)
            if how == "diagonal" and dims >= 2 and shape[-2] <= shape[-1]:
                return x.diagonal(0, -2, -1).unsqueeze(-1) + x * 0.5
            if how == "scatter views":
                return x.select_scatter(x.select(dim, 0).tanh(), dim, -1)
            if how == "tile":
                return x.tile(2)
            if how == "halves" and even:
                first, second = x.chunk(2, dim)
                return torch.maximum(first, second) * torch.lerp(first, second, 0.25)
            return x * (c(m) & (x > -9)) + torch.addcmul(x, x, c(m).double(), value=0.5).clamp(-2, 2)

        return run

    @option("multi-head attention", when=dims == 3 and shape[-1] % 2 == 0)
    def _() -> Layer:
        width = shape[-1]
        w, b = add(drawn.random(3 * width, width)), add(drawn.random(3 * width))
        o, p = add(drawn.random(width, width)), add(drawn.random(width))
        m = add(drawn.mask(shape[1], shape[1]).fill_diagonal_(1))
        kind, low = pick("fused", "plain"), pick(-torch.inf, -1e9)

        def run(x: torch.Tensor) -> torch.Tensor:
            mask = torch.zeros_like(c(m)).masked_fill(c(m) == 0, low)
            if kind == "fused":
                weights = (c(w), c(b), c(o), c(p))
                return torch._native_multi_head_attention(x, x, x, width, 2, *weights, mask, False, True, 0)[0]
            moved = x.tanh().transpose(0, 1)
            y, _ = functional.multi_head_attention_forward(
                moved, moved, moved, width, 2, c(w), c(b), None, None, False, 0.0, c(o), c(p), False, None, True, mask
            )
            return y.transpose(0, 1)

        return run
