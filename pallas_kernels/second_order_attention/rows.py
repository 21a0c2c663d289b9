"""Decayed attention with all pairs, some queries at a time: the faster form of short rows."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._core.recurrence import Documents
from pallas_kernels.second_order_attention.terms import (
    in_two,
    make_terms,
    normalized,
    wide_type,
    with_ones,
)

QUERIES = 128  # at a time


def decayed_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N"] | None,
    *,
    scale: float,
    documents: Documents | None,
    score: Literal["square", "exponential"],
) -> Float[Array, "B T N V"]:
    """Weights f(scale q_i . k_j) exp(sum of g_m, j < m <= i), normalised to sum 1 in each row.

    f = square: `ref.second_order_attention` without states. f = exp: 2Mamba-E, softmax with a decay
    (the gate of the Forgetting Transformer, arXiv 2503.02130). Memory for QUERIES rows of scores;
    they are computed again in the backward pass.
    """
    T = q.shape[1]
    size = min(T, QUERIES)
    wide = wide_type(v)
    precision = "highest" if v.dtype == wide else "high"
    real = jnp.ones((1, T), bool) if documents is None else documents.real
    q, k, v, g, index = make_terms(q, k, v, g, documents)
    place, v1 = jnp.arange(T), with_ones(v, multiple=8)

    def product(form, x, y):
        return jnp.einsum(form, x, y, preferred_element_type=wide, precision=precision)

    @jax.checkpoint
    def block(start):
        at = jnp.minimum(start + jnp.arange(size), T - 1)  # the last block reads its last row again
        # Decays are summed from the block's start in both directions, so that near pairs keep
        # their digits however long the row is.
        before = place < start
        back = jax.lax.cumsum(jnp.where(before[None, None], g, 0.0), axis=2, reverse=True)
        back = jnp.where(before[None, None], back - g, 0.0)
        log_decay = back[:, :, None]
        for part in in_two(g):
            ahead = jnp.cumsum(jnp.where(before[None, None], 0.0, part), axis=2)
            gaps = jnp.take(ahead, at, axis=2)[..., None] - ahead[:, :, None]
            log_decay = log_decay + gaps
        sees = (place[None] <= at[:, None])[None] & real[:, None]
        sees = sees & (jnp.take(index, at, axis=1)[:, :, None] == index[:, None])
        log_decay = jnp.where(sees[:, None], log_decay, -jnp.inf)
        scores = scale * product("bnik,bnjk->bnij", jnp.take(q, at, axis=2), k)
        if score == "square":
            weights = jnp.square(scores) * jnp.exp(log_decay)
        else:
            logits = scores + log_decay
            highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
            weights = jnp.exp(logits - jnp.maximum(highest, jnp.finfo(wide).min))
        sums = product("bnij,bnjv->bniv", weights.astype(v1.dtype), v1)
        return normalized(sums, v.shape[3])

    out = jax.lax.map(block, jnp.arange(0, T, size))
    out = jnp.moveaxis(out, (0, 3), (1, 2))  # [B, blocks, queries, N, V]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :T].astype(v.dtype)


def second_order_attention(q, k, v, g, *, scale, initial_state, documents):
    """As `ref.second_order_attention` where there is no initial state and none is asked for."""
    del initial_state
    attend = functools.partial(decayed_attention, score="square")
    return attend(q, k, v, g, scale=scale, documents=documents), None
