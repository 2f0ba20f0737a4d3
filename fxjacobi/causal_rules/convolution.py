"""Convolutions and poolings: the maximum over the taps that are not exactly zero.

A masked kernel (PixelCNN, arXiv 1606.05328, section 2.3) proves itself by its zero taps, a shifted convolution
(PixelCNN++, arXiv 1701.05517, section 2.3) by its padding and slices.
"""

# ruff: noqa: ARG001 - rules share one signature

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from fxjacobi.causal_rules.domain import NOTHING, Abstract, Value, broadcast, every, some, squash
from fxjacobi.causal_rules.matmul import masked_maximum
from fxjacobi.causal_rules.registry import Context, rule
from fxjacobi.graph import TensorSpec, spec_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import fx

__all__ = ["convolution_rank"]


def _channels(rank: torch.Tensor, alive: torch.Tensor | None, groups: int, size: int) -> torch.Tensor:
    """Mix channels at one tap: ``rank (B, C, *S)``, ``alive (out / groups, C / groups)`` a group; squashed result."""
    if alive is None:
        if groups == 1 or rank.stride(1) == 0:
            return squash(rank).amax(1, keepdim=True)
        grouped: torch.Tensor = rank.unflatten(1, (groups, -1)).amax(2)
        return grouped.repeat_interleave(size // groups, 1)
    parts = []
    for group, (part, taps) in enumerate(zip(rank.chunk(groups, 1), alive.chunk(groups, 0), strict=True)):
        del group
        moved = squash_spatial(part).movedim(1, -1)
        lead = moved.shape[:-1]
        mixed = masked_maximum(moved.reshape(-1, moved.shape[-1]) if moved.stride(-1) else _flat(moved), taps.T)
        mixed = mixed.expand(mixed.shape[0], taps.shape[0])
        parts.append(mixed.reshape(*lead, -1).movedim(-1, 1))
    return torch.cat(parts, 1)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Flatten all but the last dimension, which has stride 0 and keeps it."""
    return tensor[..., :1].reshape(-1, 1).expand(-1, tensor.shape[-1])


def squash_spatial(tensor: torch.Tensor) -> torch.Tensor:
    """Squash every dimension but the channels."""
    for dim in range(tensor.dim()):
        if dim != 1 and tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _taps(kernel: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return product(*(range(size) for size in kernel))


def _tuple(value: Any, count: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * count if len(values) == 1 else values


def _materialised(tensor: torch.Tensor) -> torch.Tensor:
    """Give the spatial dimensions real strides, so that slices of them are right; keep batch and channels squashed."""
    shape = tensor.shape
    small = tensor
    for dim in (0, 1):
        if small.stride(dim) == 0 and small.shape[dim] > 1:
            small = small.narrow(dim, 0, 1)
    return small.contiguous().expand(shape)


def convolution_rank(
    context: Context,
    node: fx.Node,
    source: Abstract,
    weight: Abstract,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    groups: int,
    shape: Sequence[int],
) -> torch.Tensor:
    """Return the ranks of a convolution's result, without its bias."""
    spatial = len(shape) - 2
    kernel = weight.shape[2:]
    dead = weight.equals(0) if context.may_kill else None
    if dead is not None:
        context.kill(node, weight)
    rank = _materialised(source.rank)
    out_channels = shape[1]
    result = torch.full((1, 1, *shape[2:]), NOTHING, dtype=torch.int32)
    if transposed:
        extent = [
            (n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(rank.shape[2:], stride, dilation, kernel, strict=True)
        ]
        extent = [max(e, p + o) for e, p, o in zip(extent, padding, shape[2:], strict=True)]
        result = torch.full((1, 1, *extent), NOTHING, dtype=torch.int32)
    else:
        sides = [side for p in reversed(padding) for side in (p, p)]
        batch, channels = rank.shape[:2]
        small = rank[: 1 if rank.stride(0) == 0 else batch, : 1 if rank.stride(1) == 0 else channels]
        padded = torch.ops.aten.constant_pad_nd(small, sides, NOTHING)
        rank = padded.expand(batch, channels, *padded.shape[2:])
    for tap in _taps(kernel):
        alive = None
        if dead is not None:
            here = dead
            for place in tap:
                here = here.select(2, place)
            if every(here):
                continue
            if some(here):
                # (out, in / groups); a transposed weight is (in, out / groups) and is turned group by group.
                alive = ~here
                if transposed:
                    alive = torch.cat([part.T for part in alive.chunk(groups, 0)], 0)
        if transposed:
            mixed = _channels(rank, alive, groups, out_channels)
            window = tuple(
                slice(d * t, d * t + (n - 1) * s + 1, s)
                for n, s, d, t in zip(rank.shape[2:], stride, dilation, tap, strict=True)
            )
            result = result.expand(*broadcast(result.shape[:2], mixed.shape[:2]), *result.shape[2:]).clone()
            result[(slice(None), slice(None), *window)] = torch.maximum(
                result[(slice(None), slice(None), *window)], mixed
            )
        else:
            window = tuple(
                slice(d * t, d * t + (n - 1) * s + 1, s)
                for n, s, d, t in zip(shape[2:], stride, dilation, tap, strict=True)
            )
            part = rank[(slice(None), slice(None), *window)]
            result = torch.maximum(result, _channels(part, alive, groups, out_channels))
    if transposed:
        crop = tuple(slice(p, p + o) for p, o in zip(padding, shape[2:], strict=True))
        result = result[(slice(None), slice(None), *crop)]
    if weight.highest >= 0:
        result = torch.maximum(result, torch.tensor(weight.highest, dtype=torch.int32))
    assert result.dim() == spatial + 2
    return result.expand(tuple(shape))


def _finish(node: fx.Node, rank: torch.Tensor, bias: Abstract | None) -> Abstract:
    if bias is not None and bias.highest >= 0:
        rank = torch.maximum(rank, bias.rank.reshape(1, -1, *[1] * (rank.dim() - 2)))
    return Abstract(rank)


@rule("convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution")
def _convolution(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y)[b, o, p] = max r(x)[b, c, s p + d k - pad]`` over channels c of o's group and taps k with ``w[o, c, k]`` not 0."""
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    source, weight, bias = args[:3]
    if len(source.shape) != len(weight.shape):
        return context.give_up(node, args, kwargs)
    count = len(weight.shape) - 2
    if node.target is torch.ops.aten.mkldnn_convolution.default:
        padding, stride, dilation, groups = args[3:7]
        transposed = False
    else:
        stride, padding, dilation, transposed, _, groups = args[3:9]
    rank = convolution_rank(
        context, node, source, weight, stride=_tuple(stride, count), padding=_tuple(padding, count),
        dilation=_tuple(dilation, count), transposed=transposed, groups=groups, shape=spec.shape,
    )  # fmt: skip
    return _finish(node, rank, bias)


@rule("conv1d.default", "conv2d.default", "conv3d.default")
def _composite(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """The same for the forms of ``torch.conv1d`` and its like, whose arguments have defaults."""
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    given = (
        dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False)) | kwargs
    )
    count = len(spec.shape) - 2
    if len(given["input"].shape) != len(given["weight"].shape):
        return context.give_up(node, args, kwargs)
    rank = convolution_rank(
        context, node, given["input"], given["weight"], stride=_tuple(given.get("stride", 1), count),
        padding=_tuple(given.get("padding", 0), count), dilation=_tuple(given.get("dilation", 1), count),
        transposed=False, groups=given.get("groups", 1), shape=spec.shape,
    )  # fmt: skip
    return _finish(node, rank, given.get("bias"))


def _windows(
    rank: torch.Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out: Sequence[int],
) -> torch.Tensor:
    """Return the maximum over pooling windows along the last ``len(kernel)`` dimensions."""
    count = len(kernel)
    lead = rank.dim() - count
    small = rank
    for dim in range(lead):
        if small.stride(dim) == 0 and small.shape[dim] > 1:
            small = small.narrow(dim, 0, 1)
    # ceil_mode may read past the padding: pad on the right as far as the last window goes.
    sides: list[int] = []
    for n, k, s, p, d, o in reversed(
        list(zip(rank.shape[lead:], kernel, stride, padding, dilation, out[-count:], strict=True))
    ):
        reach = (o - 1) * s + d * (k - 1) + 1
        sides += [p, max(p, reach - n - p)]
    padded = torch.ops.aten.constant_pad_nd(small, sides, NOTHING)
    result: torch.Tensor | None = None
    for tap in _taps(kernel):
        window = tuple(
            slice(d * t, d * t + (o - 1) * s + 1, s)
            for s, d, t, o in zip(stride, dilation, tap, out[-count:], strict=True)
        )
        part = padded[(..., *window)]
        result = part if result is None else torch.maximum(result, part)
    assert result is not None
    return result.expand(tuple(out))


_POOLS = (
    "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "avg_pool1d", "avg_pool2d", "avg_pool3d",
)  # fmt: skip


@rule(*_POOLS)
def _pool(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y)[p] = max r(x)[s p + d k - pad]`` over the window's places k."""
    name = str(node.target)
    average = "avg" in name
    count = next(int(digit) for digit in name.split("pool")[1] if digit.isdigit())
    names = ("input", "kernel_size", "stride", "padding", "ceil_mode") if average else (
        "input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")  # fmt: skip
    given = dict(zip(names, args, strict=False)) | kwargs
    kernel = _tuple(given["kernel_size"], count)
    stride = _tuple(given.get("stride") or kernel, count)
    padding = _tuple(given.get("padding", 0), count)
    dilation = _tuple(given.get("dilation", 1), count)
    spec = spec_of(node)
    first = spec if isinstance(spec, TensorSpec) else spec[0] if spec else None
    assert isinstance(first, TensorSpec)
    out = Abstract(_windows(_dense(given["input"].rank, count), kernel, stride, padding, dilation, first.shape))
    return out if isinstance(spec, TensorSpec) else (out, out)


def _dense(rank: torch.Tensor, count: int) -> torch.Tensor:
    """Give the last ``count`` dimensions real strides."""
    shape = rank.shape
    small = rank
    for dim in range(rank.dim() - count):
        if small.stride(dim) == 0 and small.shape[dim] > 1:
            small = small.narrow(dim, 0, 1)
    return small.contiguous().expand(shape)


@rule("adaptive_avg_pool1d", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def _adaptive(context: Context, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """``r(y)[i] = max r(x)[floor(i n / m) .. ceil((i + 1) n / m) - 1]`` along each pooled dimension, ``n`` to ``m`` places."""
    spec = spec_of(node)
    assert isinstance(spec, TensorSpec)
    rank = args[0].rank
    sizes = [args[1]] if isinstance(args[1], int) else list(args[1])
    for dim, out in zip(range(rank.dim() - len(sizes), rank.dim()), sizes, strict=True):
        n = rank.shape[dim]
        parts = [
            rank.narrow(dim, i * n // out, -(-(i + 1) * n // out) - i * n // out).amax(dim, keepdim=True)
            for i in range(out)
        ]
        rank = torch.cat(parts, dim)
    return Abstract(rank.expand(spec.shape))
