"""Cross-entropy of a linear classifier without the full matrix of logits."""

from pallas_kernels.linear_cross_entropy.api import (
    explain,
    linear_cross_entropy,
    linear_cross_entropy_per_token,
)

__all__ = ["explain", "linear_cross_entropy", "linear_cross_entropy_per_token"]
