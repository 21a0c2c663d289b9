"""Second-order attention with all pairs of tokens, in fp32: the specification."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._core.recurrence import Documents
from pallas_kernels.second_order_attention.terms import (
    features,
    make_terms,
    normalized,
    wide_type,
    with_ones,
)


def second_order_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N"] | None,
    *,
    scale: float,
    initial_state: Float[Array, "B N P V1"] | None,
    documents: Documents | None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N P V1"]]:
    """w_ij = (scale q_i . k_j)^2 exp(sum of g_m, j < m <= i) for j <= i of the same document;
    o_i = sum_j w_ij v_j / max(sum_j w_ij, SMALLEST_SUM)  (2Mamba, arXiv 2602.17363, algorithm 5).

    The state, exp(g_t) S + phi(scale k_t) [v_t, 1]^T, has P = K (K + 1) / 2 rows and V1 = V + 1
    columns, and stands for w of the tokens before the row: q_i sees phi(q_i) S there.
    """
    wide = wide_type(v)
    q, k, v = (x.astype(wide) for x in (q, k, v))
    q, k, v, g, index = make_terms(q, k, v, g, documents)
    place = jnp.arange(q.shape[2])
    later = place[:, None] > place[None]
    # Summed from each j on, not as a difference of sums from 0, which grow and lose digits.
    log_decay = jnp.cumsum(jnp.where(later[None, None], g[..., None], 0.0), axis=2)
    sees = (index[:, :, None] == index[:, None]) & (place[:, None] >= place[None])[None]
    decay = jnp.exp(jnp.where(sees[:, None], log_decay, -jnp.inf))
    scores = scale * jnp.einsum("bnik,bnjk->bnij", q, k, precision="highest")
    v1 = with_ones(v)
    sums = jnp.einsum("bnij,bnjv->bniv", jnp.square(scores) * decay, v1, precision="highest")
    added = features(scale * k) * decay[:, :, -1, :, None]
    state = jnp.einsum("bnjp,bnjv->bnpv", added, v1, precision="highest")
    if initial_state is not None:
        kept = jnp.exp(jnp.where((index == 0)[:, None], jnp.cumsum(g, axis=2), -jnp.inf))
        seen = jnp.einsum("bnip,bnpv->bniv", features(q), initial_state, precision="highest")
        sums = sums + kept[..., None] * seen
        state = state + kept[:, :, -1, None, None] * initial_state
    return jnp.moveaxis(normalized(sums, v.shape[3]), 2, 1), state
