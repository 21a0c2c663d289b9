"""Short causal convolution of each feature over time, with SiLU and norm 1 after it."""

from pallas_kernels.short_convolution.api import explain, short_convolution

__all__ = ["explain", "short_convolution"]
