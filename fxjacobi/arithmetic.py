"""Settings of the process that change what kernels round: what was measured under one holds under that one only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["arithmetic_state"]

_PRECISIONS = (
    ("generic", "all"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
    ("mkldnn", "rnn"),
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
)


def arithmetic_state() -> Hashable:
    """Return the settings in force, as part of a key.

    Float32 precision of products, convolutions and RNNs (TF32 among them), and whether algorithms are deterministic; and
    once CUDA is in use, reduced precision of half-precision products, which libraries and which fused attention are
    used, and whether cuDNN chooses its algorithms by timing them. TF32 is read by the getter of each backend: the older
    ``allow_tf32`` raises where the newer settings were used.
    """
    c = torch._C
    state = (*(c._get_fp32_precision_getter(*each) for each in _PRECISIONS), c._get_deterministic_algorithms())
    if not torch.cuda.is_initialized():
        return state
    return (
        *state,
        c._get_cublas_allow_fp16_reduced_precision_reduction(),
        c._get_cublas_allow_bf16_reduced_precision_reduction(),
        c._get_cublas_allow_fp16_accumulation(),
        c._get_blas_preferred_backend(),
        c._get_linalg_preferred_backend(),
        c._get_cudnn_enabled(),
        c._get_cudnn_benchmark(),
        c._get_cudnn_deterministic(),
        c._get_flash_sdp_enabled(),
        c._get_mem_efficient_sdp_enabled(),
        c._get_math_sdp_enabled(),
        c._get_cudnn_sdp_enabled(),
        torch.get_autocast_dtype("cuda"),
    )
