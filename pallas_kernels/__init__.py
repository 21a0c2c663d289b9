"""Kernels for TPU and GPU with portable references; depends on jax alone."""

from pallas_kernels.attention import Mask, attention
from pallas_kernels.gated_delta_rule import gated_delta_rule
from pallas_kernels.gated_linear_attention import gated_linear_attention
from pallas_kernels.linear_cross_entropy import linear_cross_entropy
from pallas_kernels.second_order_attention import second_order_attention
from pallas_kernels.short_convolution import short_convolution

__all__ = [
    "Mask",
    "attention",
    "gated_delta_rule",
    "gated_linear_attention",
    "linear_cross_entropy",
    "second_order_attention",
    "short_convolution",
]
