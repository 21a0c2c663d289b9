"""Attention by cuDNN's fused kernels, through JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
) -> Float[Array, "B T N H"]:
    """`ref.attention` in bf16 or fp16 on an NVIDIA GPU, within what `support.TABLE` declares.

    Full, causal and causal-window masks cost no memory. Any other mask is given as a dense
    [b, 1, T, S] one, of which cuDNN skips only the part beyond the diagonal.
    """
    T, S = q.shape[1], k.shape[1]
    static = mask.query_index is None and mask.key_index is None
    causal = static and bool(mask.terms) and all(term.causal for term in mask.terms)
    if static and len(mask.terms) == 1 and is_plain(mask.terms[0]):
        dense, window = None, mask.terms[0].window
    else:
        dense, window = mask.dense(T, S), None
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
    if dense is None:
        return out
    # cuDNN knows no empty row: it would average the values of masked keys.
    return jnp.where(dense.any(axis=-1)[:, :, None, None], out, jnp.zeros((), out.dtype))
