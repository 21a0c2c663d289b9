"""Short causal convolution of each feature over time: the specification, in fp32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

EPSILON = 1e-6  # below which a head's square is no longer brought to 1


def short_convolution(
    x: Float[Array, "B T N H"],
    weight: Float[Array, "N H W"],
    bias: Float[Array, "N H"] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    silu: bool,
    unit_norm: bool,
) -> Float[Array, "B T N H"]:
    """y_t = bias + sum_i weight[..., W - 1 - i] x_(t - i), then SiLU, then y / sqrt(|y|^2 + 1e-6).

    As in Mamba-2 (arXiv 2405.21060, section 7) and Gated DeltaNet (arXiv 2412.06464, section 3.4).
    """
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    y = (
        jnp.zeros_like(x)
        if bias is None
        else jnp.zeros_like(x) + bias.astype(jnp.float32)[None, None]
    )
    for i in range(min(weight.shape[-1], x.shape[1])):
        tap = jnp.pad(x, ((0, 0), (i, 0), (0, 0), (0, 0)))[:, : x.shape[1]]
        if segment_ids is not None:
            same = segment_ids == jnp.pad(segment_ids, ((0, 0), (i, 0)))[:, : x.shape[1]]
            tap = jnp.where(same[:, :, None, None], tap, 0.0)
        y = y + tap * weight[None, None, ..., -1 - i]
    y = jax.nn.silu(y) if silu else y
    if unit_norm:
        y = y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + EPSILON)
    return y
