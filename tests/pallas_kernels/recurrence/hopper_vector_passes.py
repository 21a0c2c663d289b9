"""The Hopper passes of the delta rule with a decay a key feature, written down in jnp."""

import jax
import jax.numpy as jnp
from hopper_passes import by_chunk, by_token, product, rounded

from pallas_kernels._hopper.arranged import LEAST
from pallas_kernels._hopper.levels import SIZES
from pallas_kernels._hopper.tiles import CHUNK
from pallas_kernels._hopper.vector_prepare import Prepared


def documents_of_chunks(documents):
    """By token [chunks, B, 1, C, 1], before the chunk and at its end [chunks, B, 1, 1, 1]."""
    own = by_chunk(documents[:, None])[..., None]
    last = jnp.pad(own[:-1, :, :, -1:], ((1, 0),) + ((0, 0),) * 4)
    return own, last, own[:, :, :, -1:]


def levels(summed):
    """For each size of blocks which pairs [C, C] are in neighbouring ones, and their decays."""
    token = jnp.arange(CHUNK)
    row, column = token[:, None], token[None]
    for size in SIZES:
        reference = summed[..., token & -2 * size | size, :]
        pairs = (row & size != 0) & ((row & -size) - size == column & -size)
        yield pairs, jnp.exp(-jnp.abs(summed - reference))


def prepare(q, k, g, beta, documents, *, scale, sums=True):
    N, dtype = g.shape[2], q.dtype
    q, k, weight = by_chunk(q, N), by_chunk(k, N), by_chunk(beta)
    summed = jnp.cumsum(jnp.maximum(by_chunk(g, N), LEAST), axis=3)
    end = summed[..., -1:, :]
    into, out_of, through = jnp.exp(summed), jnp.exp(end - summed), jnp.exp(end)
    same = jnp.ones((1,) * 5, bool)
    if documents is not None:
        own, last, at_end = documents_of_chunks(documents)
        into, out_of = jnp.where(own == last, into, 0.0), jnp.where(own == at_end, out_of, 0.0)
        through, same = jnp.where(at_end == last, through, 0.0), own == jnp.swapaxes(own, 3, 4)
    diagonal = jnp.eye(CHUNK)[None, None, None]
    scores, lower = diagonal * jnp.sum(q * k, axis=4)[..., None], 0.0
    for pairs, decay in levels(summed):
        decay = rounded(decay, dtype)
        left, right = rounded(decay * q, dtype), rounded(decay * k, dtype)
        pairs = same & pairs[None, None, None]
        scores += jnp.where(pairs, product("cbnik,cbnjk->cbnij", left, right), 0.0)
        lower += jnp.where(pairs, product("cbnik,cbnjk->cbnij", right, right), 0.0)
    whole = diagonal + lower * weight[..., None]
    inverse = jax.scipy.linalg.solve_triangular(
        whole, jnp.broadcast_to(diagonal, whole.shape), lower=True
    )
    inverse = inverse * weight[..., None, :]
    scores, inverse = (jnp.moveaxis(x.astype(dtype), 0, 2) for x in (scores * scale, inverse))
    return Prepared(
        *(by_token(x, dtype) for x in (into * q, into * k, out_of * k)),
        jnp.moveaxis(through[:, :, :, 0], 0, 2),
        scores,
        inverse,
        by_token(summed, jnp.float32) if sums else None,
    )


def scan(prepared, v, state, *, scale, gives, warpgroups):
    dtype, N = v.dtype, v.shape[2]

    def step(state, chunk):
        read, predict, write, v, keep, scores, inverse = chunk
        low = rounded(state, dtype)
        error = rounded(v - product("bnvk,bnik->bniv", low, predict), dtype)
        value = rounded(product("bnij,bnjv->bniv", inverse, error), dtype)
        o = product("bnvk,bnik->bniv", low, read) * scale
        o = o + product("bnij,bnjv->bniv", scores, value)
        new = keep[:, :, None] * state + product("bnjv,bnjk->bnvk", value, write)
        return new, (o, value, low)

    p = prepared
    given = [by_chunk(x, N) for x in (p.read, p.predict, p.write, v)]
    given += [jnp.moveaxis(x, 2, 0) for x in (p.keep, p.scores, p.inverse)]
    last, (o, values, states) = jax.lax.scan(step, state, given)
    if gives == "out":
        return by_token(o, dtype), None, None, last
    return None, by_token(values, dtype), jnp.moveaxis(states, 0, 2).astype(dtype), last


def reverse(prepared, d_out, d_final, *, scale, warpgroups):
    dtype, N = d_out.dtype, d_out.shape[2]

    def step(d_state, chunk):
        read, predict, write, d_out, keep, scores, inverse = chunk
        low = rounded(d_state, dtype)
        written = product("bnvk,bnjk->bnjv", low, write)
        written = written + product("bnij,bniv->bnjv", scores, d_out)
        d_v = product("bnij,bniv->bnjv", inverse, rounded(written, dtype))
        new = keep[:, :, None] * d_state
        new = new + product("bniv,bnik->bnvk", rounded(d_out * scale, dtype), read)
        return new - product("bniv,bnik->bnvk", rounded(d_v, dtype), predict), (d_v, low)

    p = prepared
    given = [by_chunk(x, N) for x in (p.read, p.predict, p.write, d_out)]
    given += [jnp.moveaxis(x, 2, 0) for x in (p.keep, p.scores, p.inverse)]
    last, (d_v, d_states) = jax.lax.scan(step, d_final, given, reverse=True)
    return by_token(d_v, dtype), jnp.moveaxis(d_states, 0, 2).astype(dtype), last


def gradients(q, k, summed, documents, beta, values, d_out, d_v, states, d_states, *, scale):
    dtype, N = q.dtype, values.shape[2]
    q, k, G, values, d_out, d_v = (by_chunk(x, N) for x in (q, k, summed, values, d_out, d_v))
    states, d_states = (jnp.moveaxis(x, 2, 0) for x in (states, d_states))
    end = G[..., -1:, :]
    into, out_of, through = jnp.exp(G), jnp.exp(end - G), jnp.exp(end)
    shown = product("cbniv,cbnjv->cbnij", d_out, values) * scale
    replaced = -product("cbniv,cbnjv->cbnij", d_v, values)
    itself, d_beta = (jnp.diagonal(x, axis1=3, axis2=4) for x in (shown, -replaced))
    if documents is not None:
        own, last, at_end = documents_of_chunks(documents)
        into, out_of = jnp.where(own == last, into, 0.0), jnp.where(own == at_end, out_of, 0.0)
        through, same = jnp.where(at_end == last, through, 0.0), own == jnp.swapaxes(own, 3, 4)
        shown, replaced = (jnp.where(same, x, 0.0) for x in (shown, replaced))
    shown, replaced = rounded(shown, dtype), rounded(replaced, dtype)

    d_q = product("cbnvk,cbniv->cbnik", states, d_out) * into * scale
    d_k = product("cbnvk,cbniv->cbnik", states, d_v) * -into
    written = product("cbnvk,cbnjv->cbnjk", d_states, values) * out_of
    upto = jnp.tril(jnp.ones((CHUNK, CHUNK)))  # [s, t]
    reads = rounded(q * d_q + k * d_k, dtype)
    d_g = product("st,cbnsk->cbntk", upto, reads)
    d_g = d_g + product("st,cbnsk->cbntk", 1.0 - upto, rounded(k * written, dtype))
    overlap = product("cbnvk,cbnvk->cbnk", states, d_states)[..., None, :]
    d_g = d_g + through * overlap
    d_q, d_k = d_q + itself[..., None] * k, d_k + written + itself[..., None] * q
    token = jnp.arange(CHUNK)
    for size, (pairs, decay) in zip(SIZES, levels(G), strict=True):
        left, right = rounded(decay * q, dtype), rounded(decay * k, dtype)
        P, R = (jnp.where(pairs[None, None, None], x, 0.0) for x in (shown, replaced))
        of_q = product("cbnij,cbnjk->cbnik", P, right) * decay
        of_k = product("cbnij,cbnjk->cbnik", R, right)
        of_k = of_k + product("cbnij,cbnik->cbnjk", P, left)
        of_k = (of_k + product("cbnij,cbnik->cbnjk", R, right)) * decay
        d_q, d_k = d_q + of_q, d_k + of_k
        # A token reads over what is up to it in its block, and writes over what is after it.
        block, later = token // size, (token & size != 0)[:, None]
        over = (block[:, None] == block[None]) & jnp.where(later, upto == 1.0, upto == 0.0)
        dots = rounded(q * of_q + k * of_k, dtype)
        d_g = d_g + product("st,cbnsk->cbntk", over, dots)
    d_q, d_k, d_g = (by_token(x, kind) for x, kind in ((d_q, dtype), (d_k, dtype), (d_g, G.dtype)))
    d_beta = jnp.moveaxis(d_beta / by_chunk(beta) ** 2, 0, 2).reshape(beta.shape)
    return d_q, d_k, d_g, d_beta
