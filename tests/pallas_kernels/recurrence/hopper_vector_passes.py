"""The Hopper passes of the delta rule with a decay a key feature, written down in jnp."""

import jax
import jax.numpy as jnp
from hopper_passes import by_chunk, by_token, product, rounded

from pallas_kernels._hopper.tiles import CHUNK
from pallas_kernels._hopper.vector_prepare import LEVELS, Prepared


def documents_of_chunks(documents):
    """By token [chunks, B, 1, C, 1], before the chunk and at its end [chunks, B, 1, 1, 1]."""
    own = by_chunk(documents[:, None])[..., None]
    last = jnp.pad(own[:-1, :, :, -1:], ((1, 0),) + ((0, 0),) * 4)
    return own, last, own[:, :, :, -1:]


def levels(summed):
    """For each size of blocks which pairs [C, C] are in neighbouring ones, and their decays."""
    token = jnp.arange(CHUNK)
    row, column = token[:, None], token[None]
    for size in LEVELS:
        reference = summed[..., token & -2 * size | size, :]
        pairs = (row & size != 0) & ((row & -size) - size == column & -size)
        yield pairs, jnp.exp(-jnp.abs(summed - reference))


def prepare(q, k, g, beta, documents, *, scale):
    N, dtype = g.shape[2], q.dtype
    q, k, weight = by_chunk(q, N), by_chunk(k, N), by_chunk(beta)
    summed = jnp.cumsum(by_chunk(g, N), axis=3)
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
        by_token(summed, jnp.float32),
        scores,
        inverse,
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
