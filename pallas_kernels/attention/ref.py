"""The specification of attention: fp32, every score in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.attention.mask import Mask


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N H"]:
    """Scaled dot-product attention of Vaswani et al. 2017, equation 1, for grouped queries.

    With a_ts = cap(scale q_t . k_s), cap(x) = c tanh(x / c), over the keys s that `mask` allows:

        o_t = sum_s exp(a_ts) v_s / (sum_s exp(a_ts) + exp(sink))

    where the last term is there only with `sinks` (one logit a head, which takes weight and has no
    value). Head n reads key head n // (N / K). A query with no allowed key gets 0.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    queries = q.astype(jnp.float32).reshape(B, T, K, N // K, H)
    keys, values = k.astype(jnp.float32), v.astype(jnp.float32)
    highest = jax.lax.Precision.HIGHEST
    logits = scale * jnp.einsum("btkgh,bskh->bkgts", queries, keys, precision=highest)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(mask.dense(T, S)[:, None, None], logits, -jnp.inf)
    maximum = logits.max(axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        maximum = jnp.maximum(maximum, sink)
    maximum = jax.lax.stop_gradient(jnp.where(maximum == -jnp.inf, 0.0, maximum))
    weights = jnp.exp(logits - maximum)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sink - maximum)
    weights /= jnp.where(total == 0, 1.0, total)
    out = jnp.einsum("bkgts,bskh->btkgh", weights, values, precision=highest)
    return out.reshape(B, T, N, H).astype(q.dtype)
