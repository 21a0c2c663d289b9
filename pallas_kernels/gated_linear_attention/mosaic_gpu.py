"""Linear attention in chunks on Hopper, with no decay or one a head."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._core.recurrence import Documents
from pallas_kernels._hopper.rule import chunked


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N"] | None,
    *,
    scale: float,
    initial_state: Float[Array, "B N K V"] | None,
    documents: Documents | None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """As `ref.gated_linear_attention`; the chunk form of Mamba-2 (arXiv 2405.21060, section 6)."""
    index = None
    if documents is not None:
        index, real = documents
        g = g if g is None else jnp.where(real[:, :, None], g, 0.0)
        k = jnp.where(real[:, :, None, None], k, 0)
    if initial_state is None:
        initial_state = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), jnp.float32)
    return chunked(q, k, v, g, None, initial_state.astype(jnp.float32), index, scale)
