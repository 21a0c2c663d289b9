"""Second-order attention token by token: a state of constant size."""

import jax
import jax.numpy as jnp

from pallas_kernels.second_order_attention.terms import (
    feature_count,
    features,
    make_terms,
    normalized,
    wide_type,
    with_ones,
)


def second_order_attention(q, k, v, g, *, scale, initial_state, documents):
    """As `ref.second_order_attention`: S' = exp(g) S, o = phi(q) S' + (scale q . k)^2 [v, 1].

    A token's own weight is no sum of features: where it is small, such a sum loses its digits.
    """
    wide = wide_type(v)
    q, k, v = (x.astype(wide) for x in (q, k, v))
    q, k, v, g, index = make_terms(q, k, v, g, documents)
    starts = jnp.diff(index, axis=1, prepend=0) > 0
    keep = jnp.where(starts[:, None], 0.0, jnp.exp(g))

    def step(state, token):
        q, k, v1, keep = token
        state = keep[..., None, None] * state
        own = jnp.square(scale * jnp.sum(q * k, axis=-1, keepdims=True)) * v1
        out = own + jnp.einsum("bnp,bnpv->bnv", features(q), state, precision="highest")
        return state + features(scale * k)[..., None] * v1[..., None, :], out

    if initial_state is None:
        sizes = (*q.shape[:2], feature_count(q.shape[3]), v.shape[3] + 1)
        initial_state = jnp.zeros_like(q, wide, sizes)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (q, k, with_ones(v), keep))
    state, sums = jax.lax.scan(step, initial_state.astype(wide), tokens)
    return jnp.moveaxis(normalized(sums, v.shape[3]), 0, 1), state
