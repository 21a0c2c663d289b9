"""The gated delta rule, token by token in fp32: the specification."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._core.recurrence import Documents, over_heads


def gated_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N *K"] | None,
    beta: Float[Array, "B T N"],
    *,
    scale: float,
    initial_state: Float[Array, "B N K V"] | None,
    documents: Documents | None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """Decay, predict from the decayed state, write the error, read:

    S = exp(g_t) S;  u = beta_t (v_t - S^T k_t);  S = S + k_t u^T;  o_t = scale S^T q_t.

    Gated DeltaNet (arXiv 2412.06464, eq. 10, transposed); with a decay of each key feature, Kimi
    delta attention (2510.26692, eq. 1); with none, DeltaNet (2406.06484, eq. 3). Keys are expected
    to have norm 1. A new document starts from zeros; padding changes no state.
    """
    heads = v.shape[2]
    q, k = (over_heads(x.astype(jnp.float32), heads) for x in (q, k))
    v, beta = v.astype(jnp.float32), beta.astype(jnp.float32)
    if g is None:
        g = jnp.zeros(v.shape[:3], jnp.float32)
    g = g.astype(jnp.float32).reshape(*v.shape[:3], -1)  # [B, T, N, 1 or K]
    keep = jnp.exp(g)
    if documents is not None:
        index, real = documents
        starts = jnp.diff(index, axis=1, prepend=0) > 0
        keep = jnp.where(starts[:, :, None, None], 0.0, keep)
        keep = jnp.where(real[:, :, None, None], keep, 1.0)
        beta = jnp.where(real[:, :, None], beta, 0.0)

    def step(state, token):
        q, k, v, keep, beta = token
        state = keep[..., None] * state
        error = v - jnp.einsum("bnkv,bnk->bnv", state, k, precision="highest")
        state = state + k[..., :, None] * (beta[..., None] * error)[..., None, :]
        return state, scale * jnp.einsum("bnkv,bnk->bnv", state, q, precision="highest")

    if initial_state is None:
        sizes = (v.shape[0], heads, k.shape[3], v.shape[3])
        initial_state = jnp.zeros_like(v, jnp.float32, sizes)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, keep, beta))
    state, o = jax.lax.scan(step, initial_state.astype(jnp.float32), tokens)
    return jnp.moveaxis(o, 0, 1), state
