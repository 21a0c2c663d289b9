"""Cross-entropy of a linear classifier without the full matrix of logits."""

from pallas_kernels.linear_cross_entropy.api import (
    linear_cross_entropy,
    linear_cross_entropy_per_token,
)

__all__ = ["linear_cross_entropy", "linear_cross_entropy_per_token"]
