"""The gated delta rule in chunks on Hopper."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._core.recurrence import Documents
from pallas_kernels._hopper import rule, vector_rule


def gated_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N"] | Float[Array, "B T N K"] | None,
    beta: Float[Array, "B T N"],
    *,
    scale: float,
    initial_state: Float[Array, "B N K V"] | None,
    documents: Documents | None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """As `ref.gated_delta_rule`; the chunk form of arXiv 2412.06464, section 3.3."""
    index = None
    if g is None:
        g = jnp.zeros(v.shape[:3], jnp.float32)
    if documents is not None:
        index, real = documents
        g, beta = (
            jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0.0) for x in (g, beta)
        )
    if initial_state is None:
        initial_state = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), jnp.float32)
    chunked = vector_rule.chunked if g.ndim == 4 else rule.chunked
    return chunked(q, k, v, g, beta, initial_state.astype(jnp.float32), index, scale)
