"""Linear attention with a decay: S_t = exp(g_t) S_(t-1) + k_t v_t^T."""

from pallas_kernels.gated_linear_attention.api import explain, gated_linear_attention

__all__ = ["explain", "gated_linear_attention"]
