"""Squared scores with a decay, normalised: linear attention over products of two key features."""

from pallas_kernels.second_order_attention.api import explain, second_order_attention

__all__ = ["explain", "second_order_attention"]
