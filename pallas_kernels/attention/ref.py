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
    return_log_sum_exp: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Scaled dot-product attention of Vaswani et al. 2017, equation 1, for grouped queries.

    With a_ts = cap(scale q_t . k_s), cap(x) = c tanh(x / c), over the keys s that `mask` allows:

        o_t = sum_s exp(a_ts) v_s / (sum_s exp(a_ts) + exp(sink))

    where the last term is there only with `sinks` (one logit a head, which takes weight and has no
    value). Head n reads key head n // (N / K). A query with no allowed key gets 0.

    With `return_log_sum_exp` also the logarithm of the denominator: -inf where it is 0.
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
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    out = jnp.einsum("bkgts,bskh->btkgh", weights / total, values, precision=highest)
    out = out.reshape(B, T, N, H).astype(q.dtype)
    if not return_log_sum_exp:
        return out
    lse = jnp.where(empty, -jnp.inf, maximum + jnp.log(total))  # [B, K, G, T, 1]
    return out, jnp.moveaxis(lse[..., 0], 3, 1).reshape(B, T, N)


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
    soft_cap: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """What keys k and values v, a part of all, add to the gradients of q, k and v; fp32.

    out and log_sum_exp are those over all keys: sum_p w_p o_p and log sum_p exp(l_p) over the
    parts p, where w_p = exp(l_p - log_sum_exp). So d o_p = w_p d_out, and d l_p = w_p d_out .
    (o_p - out); the rest is left to differentiation.
    """
    q, k, v, out, d_out = (array.astype(jnp.float32) for array in (q, k, v, out, d_out))

    def part(q, k, v):
        return attention(
            q, k, v, mask=mask, scale=scale, soft_cap=soft_cap, return_log_sum_exp=True
        )

    (part_out, part_lse), pull = jax.vjp(part, q, k, v)
    empty = part_lse == -jnp.inf
    weight = jnp.where(empty, 0.0, jnp.exp(part_lse - jnp.where(empty, 0.0, log_sum_exp)))
    d_part = weight[..., None] * d_out
    return pull((d_part, (d_part * (part_out - out)).sum(axis=-1)))
