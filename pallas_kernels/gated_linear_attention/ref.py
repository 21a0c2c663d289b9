"""Linear attention with a decay, token by token in fp32: the specification."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._core.recurrence import Documents, over_heads


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N *K"] | None,
    *,
    scale: float,
    initial_state: Float[Array, "B N K V"] | None,
    documents: Documents | None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """S_t = exp(g_t) S_(t-1) + k_t v_t^T and o_t = scale S_t^T q_t, for each value head.

    Linear attention (arXiv 2006.16236, eq. 18-20 without the normaliser), retention (2307.08621,
    eq. 1), GLA (2312.06635, eq. 3) and Mamba-2 (2405.21060, section 6) by their q, k, v and g.
    A new document starts from zeros; padding changes no state.
    """
    heads = v.shape[2]
    q, k = (over_heads(x.astype(jnp.float32), heads) for x in (q, k))
    v = v.astype(jnp.float32)
    if g is None:
        g = jnp.zeros(v.shape[:3], jnp.float32)
    g = g.astype(jnp.float32).reshape(*v.shape[:3], -1)  # [B, T, N, 1 or K]
    keep = jnp.exp(g)
    if documents is not None:
        index, real = documents
        starts = jnp.diff(index, axis=1, prepend=0) > 0
        keep = jnp.where(starts[:, :, None, None], 0.0, keep)
        keep = jnp.where(real[:, :, None, None], keep, 1.0)
        k = jnp.where(real[:, :, None, None], k, 0.0)

    def step(state, token):
        q, k, v, keep = token
        state = keep[..., None] * state + k[..., :, None] * v[..., None, :]
        return state, scale * jnp.einsum("bnkv,bnk->bnv", state, q, precision="highest")

    if initial_state is None:
        sizes = (v.shape[0], heads, k.shape[3], v.shape[3])
        initial_state = jnp.zeros_like(v, jnp.float32, sizes)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, keep))
    state, o = jax.lax.scan(step, initial_state.astype(jnp.float32), tokens)
    return jnp.moveaxis(o, 0, 1), state
