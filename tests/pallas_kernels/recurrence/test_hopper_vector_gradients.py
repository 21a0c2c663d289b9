"""Gradients of the delta rule with a decay of each feature on Hopper: its passes, written in jnp."""

import jax
import jax.numpy as jnp
from hopper_passes import by_chunk, by_token, product, rounded

from pallas_kernels._hopper.tiles import CHUNK


def reverse(
    read, predict, write, keep, d_out, scores, inverse, d_final, *, scale, warpgroups
):  # fmt: skip
    """As `vector_reverse.reverse`, with the roundings of the kernel."""
    dtype = read.dtype
    N = d_out.shape[2]

    def step(d_state, chunk):
        read, predict, write, d_out, keep, scores, inverse = chunk
        low = rounded(d_state, dtype)
        written = product("bnvk,bnjk->bnjv", low, write)
        written = written + product("bnij,bniv->bnjv", scores, d_out)
        d_v = product("bnij,bniv->bnjv", inverse, rounded(written, dtype))
        new = keep[:, :, None] * d_state
        new = new + product("bniv,bnik->bnvk", rounded(d_out * scale, dtype), read)
        return new - product("bniv,bnik->bnvk", rounded(d_v, dtype), predict), (d_v, low)

    given = [by_chunk(x, N) for x in (read, predict, write, d_out)]
    given += [jnp.moveaxis(x, 2, 0) for x in (keep, scores, inverse)]
    last, (d_v, d_states) = jax.lax.scan(step, d_final, given, reverse=True)
    return by_token(d_v, dtype), jnp.moveaxis(d_states, 0, 2).astype(dtype), last


def gradients(q, k, summed, documents, beta, values, d_out, d_v, states, d_states, *, scale):
    """As `vector_gradients.gradients`, with the roundings of the kernel."""
    dtype, (_, _, N, _) = q.dtype, values.shape
    q, k, G, values, d_out, delta = (by_chunk(x, N) for x in (q, k, summed, values, d_out, d_v))
    states, d_states = (jnp.moveaxis(x, 2, 0) for x in (states, d_states))
    token = jnp.arange(CHUNK)
    one, into, out_of = jnp.ones((CHUNK, CHUNK), bool)[None, None, None], True, True
    if documents is not None:
        own = by_chunk(documents[:, None])
        one = own[..., :, None] == own[..., None, :]
        last = jnp.pad(own[:-1, ..., -1:], ((1, 0), (0, 0), (0, 0), (0, 0)))
        into, out_of = (own == last)[..., None], (own == own[..., -1:])[..., None]
    shown = jnp.where(one, product("cbniv,cbnjv->cbnij", d_out, values) * scale, 0.0)
    replaced = product("cbniv,cbnjv->cbnij", delta, values)
    d_beta = jnp.diagonal(replaced, axis1=3, axis2=4) / by_chunk(beta) ** 2
    replaced = jnp.where(one, -replaced, 0.0)
    itself = jnp.diagonal(shown, axis1=3, axis2=4)[..., None]
    shown, replaced = rounded(shown, dtype), rounded(replaced, dtype)

    end = G[..., -1:, :]
    before, after = jnp.where(into, jnp.exp(G), 0.0), jnp.where(out_of, jnp.exp(end - G), 0.0)
    keep = jnp.where(into, jnp.exp(G), 0.0)[..., -1, :]
    d_q = product("cbnvk,cbniv->cbnik", states, d_out) * before * scale
    d_k = product("cbnvk,cbniv->cbnik", states, delta) * -before
    reads = rounded(q * d_q + k * d_k, dtype)
    writes = product("cbnvk,cbnjv->cbnjk", d_states, values) * after
    d_k = d_k + writes
    upto = (token[:, None] <= token[None, :]).astype(jnp.float32)  # t <= s
    d_g = product("ts,cbnsk->cbntk", upto, reads)
    d_g = d_g + product("ts,cbnsk->cbntk", 1.0 - upto, rounded(k * writes, dtype))
    d_g = d_g + (keep * product("cbnvk,cbnvk->cbnk", states, d_states))[..., None, :]
    d_q, d_k = d_q + itself * k, d_k + itself * q
    for size in (1, 2, 4, 8, 16, 32):
        block, later = token // size, token // size % 2 == 1
        pairs = later[:, None] & (block[:, None] == block[None, :] + 1)
        reference = jnp.take(G, token // (2 * size) * 2 * size + size, axis=3)
        E = jnp.exp(-jnp.abs(G - reference))
        left, right = rounded(E * q, dtype), rounded(E * k, dtype)
        P, R = (jnp.where(pairs, x, 0.0) for x in (shown, replaced))
        of_q = product("cbnij,cbnjk->cbnik", P, right)
        of_k = product("cbnij,cbnjk->cbnik", R, right)
        of_k = of_k + product("cbnij,cbnik->cbnjk", P, left)
        of_k = of_k + product("cbnij,cbnik->cbnjk", R, right)
        d_q, d_k = d_q + E * of_q, d_k + E * of_k
        between = (block[:, None] == block[None, :]) & (later == (upto == 1))
        dots = rounded(E * (q * of_q + k * of_k), dtype)
        d_g = d_g + product("ts,cbnsk->cbntk", between.astype(jnp.float32), dots)
    d_q, d_k, d_g = by_token(d_q, dtype), by_token(d_k, dtype), by_token(d_g, jnp.float32)
    return d_q, d_k, d_g, jnp.moveaxis(d_beta, 0, 2).reshape(beta.shape)
