"""Rules for operations that compute: along dimensions, layers whose first dimension is the batch, products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx
from torch.fx.node import map_arg

from fxjacobi.attention_names import ATTENTION
from fxjacobi.graph import TensorSpec, spec_of
from fxjacobi.sample_rules import (
    Axes,
    Resized,
    Shrink,
    aligned,
    broadcast,
    given,
    mixes,
    only,
    sample_rule,
    shape_of,
    with_parts,
)

if TYPE_CHECKING:
    from fxjacobi.sample_axis import SampleAxis

# -- along dimensions -----------------------------------------------------------------------------------------------


@sample_rule(
    "_softmax", "_log_softmax", "_safe_softmax", "softmax.int", "log_softmax.int", "cumsum", "cumprod", "logcumsumexp",
    "cummax", "cummin", "sort", "sort.stable", "argsort", "topk", "glu",
)  # fmt: skip
def _along(s: Shrink, node: fx.Node) -> Resized:
    axis, dim = only(s, node), given(node, "dim")
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    if dim is None or int(dim) % rank == axis.dim:
        raise mixes(node)
    spec = spec_of(node)
    return (axis if isinstance(spec, TensorSpec) else (axis,) * len(spec or ())), *with_parts(s, node, {0: axis})


@sample_rule(
    "sum.dim_IntList", "mean.dim", "prod.dim_int", "amax", "amin", "any.dim", "any.dims", "all.dim", "all.dims",
    "var.correction", "std.correction", "var_mean.correction", "std_mean.correction", "logsumexp", "argmax", "argmin",
    "max.dim", "min.dim", "linalg_vector_norm", "norm.ScalarOpt_dim", "count_nonzero.dim_IntList", "nansum",
)  # fmt: skip
def _reduction(s: Shrink, node: fx.Node) -> Resized:
    axis, dims = only(s, node), given(node, "dim")
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    chosen = [dims] if isinstance(dims, int) else list(dims or range(rank))
    chosen = [dim % rank for dim in chosen]
    if axis.dim in chosen:
        raise mixes(node)
    out = axis if given(node, "keepdim") else axis.moved(-sum(dim < axis.dim for dim in chosen))
    spec = spec_of(node)
    return (out if isinstance(spec, TensorSpec) else (out,) * len(spec or ())), *with_parts(s, node, {0: axis})


@sample_rule("constant_pad_nd")
def _pad(s: Shrink, node: fx.Node) -> Resized:
    axis, widths = only(s, node), list(node.args[1])  # type: ignore[arg-type]
    place = 2 * (len(shape_of(node)) - 1 - axis.dim)
    if any(widths[place : place + 2]):
        raise mixes(node)
    return axis, *with_parts(s, node, {0: axis})


@sample_rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(s: Shrink, node: fx.Node) -> Resized:
    axis = only(s, node)
    if axis.dim >= len(shape_of(node.args[0])) - len(node.args[1]):  # type: ignore[arg-type]
        raise mixes(node)
    spec = spec_of(node)
    return (axis if isinstance(spec, TensorSpec) else (axis,) * len(spec or ())), *with_parts(s, node, {0: axis})


# -- operations whose first dimension is the batch ------------------------------------------------------------------


def _leading(s: Shrink, node: fx.Node, *, results: int | None = None) -> Resized:
    """The samples lie along the first dimension of the first argument, and of the first ``results`` results."""
    axis = only(s, node)
    if axis.dim != 0:
        raise mixes(node)
    spec = spec_of(node)
    args = with_parts(s, node, {0: axis})
    if isinstance(spec, TensorSpec):
        return axis, *args
    count = len(spec or ())
    known = count if results is None else results
    return tuple(axis if i < known else None for i in range(count)), *args


_IMAGES = (
    "convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution", "conv1d.default", "conv2d.default",
    "conv3d.default", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d",
)  # fmt: skip


@sample_rule(*_IMAGES)
def _image(s: Shrink, node: fx.Node) -> Resized:
    return _leading(s, node)


@sample_rule("_native_batch_norm_legit_no_training", "_batch_norm_no_update", "native_batch_norm", "batch_norm")
def _batch_norm(s: Shrink, node: fx.Node) -> Resized:
    if given(node, "training"):
        raise mixes(node)
    return _leading(s, node, results=1)


@sample_rule("native_group_norm")
def _group_norm(s: Shrink, node: fx.Node) -> Resized:
    axes, args, kwargs = _leading(s, node)
    axis = axes[0] if isinstance(axes, tuple) else axes
    assert axis is not None
    return axes, (*args[:3], axis.length(s.fewer), *args[4:]), kwargs


@sample_rule("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
def _fused_attention(s: Shrink, node: fx.Node) -> Resized:
    axis = s.axis(node.args[0])  # type: ignore[arg-type]
    whole_batches = {0: axis}
    if "multi_head" in str(node.target):
        whole_batches |= {1: axis, 2: axis}
    mask = given(node, "mask")
    if axis is None or axis.dim != 0 or ("encoder" in str(node.target) and given(node, "norm_first") is None):
        raise mixes(node)
    if (isinstance(mask, fx.Node) and len(shape_of(mask)) != 2) or given(node, "mask_type") == 1:
        raise mixes(node, "masks each of them in its own way")
    spec = spec_of(node)
    axes: Axes = axis if isinstance(spec, TensorSpec) else (axis, *[None] * (len(spec or ()) - 1))
    return axes, *with_parts(s, node, whole_batches)


# -- products -------------------------------------------------------------------------------------------------------


def _product(s: Shrink, node: fx.Node, left: int, rank: int) -> tuple[SampleAxis, dict[int, SampleAxis | None]]:
    """Return where samples lie in the product of the arguments at ``left`` and ``left + 1``, and in these."""
    a, b = (s.axis(node.args[left + i]) for i in (0, 1))  # type: ignore[arg-type]
    batch = rank - 2  # dimensions along which matrices are multiplied one by one
    if a is not None and b is not None:
        if a != b or a.dim >= batch:
            raise mixes(node)
        return a, {left: a, left + 1: b}
    axis = a or b
    if axis is None:
        raise mixes(node)
    if axis.dim < batch:
        return axis, {left: axis, left + 1: axis}
    if (a is not None and axis.dim == batch) or (b is not None and axis.dim == batch + 1):
        return axis, {left: a, left + 1: b}
    raise mixes(node)


@sample_rule("mm", "bmm")
def _mm(s: Shrink, node: fx.Node) -> Resized:
    axis, axes = _product(s, node, 0, len(shape_of(node)))
    return axis, *with_parts(s, node, axes)


@sample_rule("addmm", "baddbmm")
def _addmm(s: Shrink, node: fx.Node) -> Resized:
    shape, base = shape_of(node), node.args[0]
    axis, axes = _product(s, node, 1, len(shape))
    assert isinstance(base, fx.Node)
    if s.axis(base) is not None and s.axis(base) != axis.moved(len(shape_of(base)) - len(shape)):
        raise mixes(node)
    return axis, *with_parts(s, node, axes | {0: aligned(s, base, axis, shape)})


@sample_rule("mv")
def _mv(s: Shrink, node: fx.Node) -> Resized:
    return _leading(s, node)


@sample_rule("linear")
def _linear(s: Shrink, node: fx.Node) -> Resized:
    axis = only(s, node)
    if axis.dim == len(shape_of(node)) - 1:
        raise mixes(node)
    return axis, *with_parts(s, node, {0: axis})


@sample_rule(*ATTENTION)
def _attention(s: Shrink, node: fx.Node) -> Resized:
    nodes: list[fx.Node] = [n for n in node.args[:3] if isinstance(n, fx.Node)]
    axis = broadcast(s, node, shape_of(nodes[0]), nodes)
    if axis.dim >= len(shape_of(nodes[0])) - 3 or any(len(shape_of(n)) != len(shape_of(nodes[0])) for n in nodes):
        raise mixes(node)
    masks = [m for name in ("attn_mask", "attn_bias") if isinstance(m := given(node, name), fx.Node)]

    def place(one: fx.Node) -> Any:
        return s.operand(one, aligned(s, one, axis, shape_of(nodes[0])) if one in masks else axis)

    spec = spec_of(node)
    axes: Axes = axis if isinstance(spec, TensorSpec) else (axis, *[None] * (len(spec or ()) - 1))
    return axes, map_arg(node.args, place), map_arg(dict(node.kwargs), place)
