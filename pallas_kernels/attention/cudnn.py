"""Attention by cuDNN's fused kernels, through JAX."""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from pallas_kernels._core import compat
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.support import is_plain


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float,
    soft_cap: None = None,
    sinks: None = None,
    return_log_sum_exp: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`ref.attention` in bf16 or fp16 on an NVIDIA GPU, within what `support.TABLE` declares.

    Full, causal and causal-window masks cost no memory. Any other mask is given as a dense
    [b, 1, T, S] one, of which cuDNN skips only the part beyond the diagonal. The log-sum-exp
    cannot be differentiated.
    """
    T, S = q.shape[1], k.shape[1]
    dense, causal, window = _lower(mask, T, S)
    if return_log_sum_exp:
        out, lse = compat.cudnn_attention(q, k, v, dense, scale, causal, window)
        lse = _undifferentiable(lse)
    else:
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=None if dense is None else dense[:, None],
            scale=scale,
            is_causal=causal,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    if dense is None and window is not None and T > S:
        dense = mask.dense(T, S)  # queries past the last key's window see none
    if dense is not None:
        # cuDNN knows no empty row: it would average the values of masked keys.
        some = dense.any(axis=-1)[:, :, None]
        out = jnp.where(some[..., None], out, jnp.zeros((), out.dtype))
        lse = jnp.where(some, lse, -jnp.inf) if return_log_sum_exp else None
    return (out, lse) if return_log_sum_exp else out


def gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    log_sum_exp: Float[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    *,
    mask: Mask,
    scale: float,
    soft_cap: None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """`ref.gradients` by cuDNN's backward kernel, rounded to the dtype of q, k and v."""
    dense, causal, window = _lower(mask, q.shape[1], k.shape[1])
    # An empty row has out = 0; a log-sum-exp above any score makes its weights 0 as well.
    lse = jnp.where(log_sum_exp == -jnp.inf, jnp.float32(1e30), log_sum_exp)
    parts = compat.cudnn_attention_gradients(
        q, k, v, dense, lse, out, d_out.astype(q.dtype), scale, causal, window
    )
    dq, dk, dv = (part.astype(jnp.float32) for part in parts)
    return dq, dk, dv


def _lower(mask, T, S):
    """The mask as cuDNN takes it: dense bool [b, T, S] or None, whether causal, and a window."""
    static = mask.query_index is None and mask.key_index is None
    causal = static and bool(mask.terms) and all(term.causal for term in mask.terms)
    if static and len(mask.terms) == 1 and is_plain(mask.terms[0]):
        return None, causal, mask.terms[0].window
    return mask.dense(T, S), causal, None


@jax.custom_vjp
def _undifferentiable(lse):
    """`lse`, of which a gradient would be silently dropped by JAX's binding of cuDNN."""
    return lse


def _forward(lse):
    return lse.value, lse.value


def _backward(lse, d_lse):
    if isinstance(d_lse, SymbolicZero):
        return (jnp.zeros_like(lse),)
    raise ValueError(
        "attention: 'cudnn' has no gradient of the log-sum-exp; take implementation='xla'"
    )


_undifferentiable.defvjp(_forward, _backward, symbolic_zeros=True)
