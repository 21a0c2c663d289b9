"""Kernels for TPU and GPU with portable references; depends on jax alone."""

from pallas_kernels.attention import Mask, attention

__all__ = ["Mask", "attention"]
