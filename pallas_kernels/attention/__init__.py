"""Attention: the public names of this op."""

from pallas_kernels.attention.api import attention, explain, gradients
from pallas_kernels.attention.mask import Mask, Term

__all__ = ["Mask", "Term", "attention", "explain", "gradients"]
