"""The names of scaled dot-product attention (arXiv 1706.03762, section 3.2) in ATen, one for each kernel."""

from __future__ import annotations

__all__ = ["ATTENTION"]

ATTENTION = (
    "scaled_dot_product_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
"""Each takes query, key and value first, and returns the averages first."""
