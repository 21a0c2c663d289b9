"""Linear attention in chunks with a decay of each key feature, without any exponent above 0.

The decay between two tokens is split at a token between them: a chunk is halved, and its halves,
down to single tokens; pairs across a middle are one product of scaled queries and scaled keys.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_linear_attention import chunks
from pallas_kernels.gated_linear_attention.chunks import Masks, Sums, product, scaled


class Chunked(NamedTuple):
    """The arguments in chunks; decays as in `xla.Chunked`, of each feature."""

    q: Float[Array, "M B H 1 L K"]
    k: Float[Array, "M B H 1 L K"]
    v: Float[Array, "M B H R L V"]
    mask: Masks  # with axes H and R
    sums: Sums  # [M, B, H, R, L, K]
    read: Float[Array, "M B H R L K"]
    write: Float[Array, "M B H R L K"]
    keep: Float[Array, "M B H R K 1"]


def _chunked(q, k, v, g, documents, size) -> Chunked:
    heads = q.shape[2]
    mask = Masks(*(x[:, :, None, None] for x in chunks.masks(documents, size)))
    k = chunks.without_padding(k, documents)
    q, k, v, g = (chunks.grouped(chunks.split(x, size), heads) for x in (q, k, v, g))
    sums = chunks.sums(jnp.where(mask.gate[..., None], g, 0.0), axis=4)
    return Chunked(
        q, k, v, mask, sums,
        chunks.masked_exp(sums.total(), mask.read[..., None]),
        chunks.masked_exp(sums[..., -1:, :] - sums, mask.write[..., None]),
        chunks.masked_exp(sums[..., -1, :].total(), mask.keep[..., None])[..., None],
    )  # fmt: skip


def _states(c: Chunked, initial_state):
    update = product("mbhrjk,mbhrjv->mbhrkv", scaled(c.k, c.write), c.v)
    first = initial_state.reshape(update.shape[1:])
    return chunks.scan_states(first, c.keep, update, c.k.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend(q, k, v, g, initial_state, documents, scale: float, size: int):
    """(o fp32, final state); g [B, T, N, K]."""
    c = _chunked(q, k, v, g, documents, size)
    weights = jnp.where(c.mask.pair, scale * _scores(c.q, c.k, c.sums), 0.0)
    o = product("mbhrij,mbhrjv->mbhriv", weights.astype(v.dtype), c.v)
    final_state, states = _states(c, initial_state)
    o += scale * product("mbhrik,mbhrkv->mbhriv", scaled(c.q, c.read), states)
    return chunks.join_groups(o, q.shape[1]), final_state.reshape(initial_state.shape)


def _forward(q, k, v, g, initial_state, documents, scale, size):
    arguments = (q, k, v, g, initial_state, documents)
    return attend(*arguments, scale, size), arguments


def _backward(scale, size, arguments, cotangents):
    q, k, v, g, initial_state, documents = arguments
    d_o, d_final = cotangents
    length, dtype = q.shape[1], q.dtype
    c = _chunked(q, k, v, g, documents, size)
    _, states = _states(c, initial_state)
    d_o = scale * chunks.grouped(chunks.split(d_o, size), q.shape[2])  # q is never scaled
    narrow = d_o.astype(dtype)
    update = product("mbhrik,mbhriv->mbhrkv", scaled(c.q, c.read), narrow)
    d_first = d_final.reshape(update.shape[1:])
    d_initial, d_states = chunks.scan_states(d_first, c.keep, update, dtype, reverse=True)

    weights = jnp.where(c.mask.pair, _scores(c.q, c.k, c.sums), 0.0).astype(dtype)
    d_v = product("mbhrij,mbhriv->mbhrjv", weights, narrow)
    d_v += product("mbhrjk,mbhrkv->mbhrjv", scaled(c.k, c.write), d_states)
    d_scores = jnp.where(c.mask.pair, product("mbhriv,mbhrjv->mbhrij", narrow, c.v), 0.0)
    d_q_pairs, d_k_pairs = _scores_gradients(c.q, c.k, c.sums, d_scores)
    d_q_state = c.read * product("mbhriv,mbhrkv->mbhrik", narrow, states)
    d_k_state = c.write * product("mbhrjv,mbhrkv->mbhrjk", c.v, d_states)
    itself = jnp.einsum("mbhrii->mbhri", d_scores)[..., None]  # decays by nothing
    wide_q, wide_k = c.q.astype(jnp.float32), c.k.astype(jnp.float32)
    d_q = jnp.sum(d_q_pairs + d_q_state + itself * wide_k, axis=3)
    d_k = jnp.sum(d_k_pairs + d_k_state + itself * wide_q, axis=3)

    later = wide_q * (d_q_pairs + d_q_state) - wide_k * d_k_pairs
    writes = wide_k * d_k_state
    kept = jnp.sum(states.astype(jnp.float32) * d_states.astype(jnp.float32), axis=5)
    d_g = chunks.gate_gradient(later, writes, c.keep[..., 0] * kept, axis=4)
    d_g = jnp.where(c.mask.gate[..., None], d_g, 0.0)
    d_g = chunks.join_groups(d_g, length)
    return (
        chunks.join(d_q, length).astype(dtype),
        chunks.without_padding(chunks.join(d_k, length), documents).astype(dtype),
        chunks.join_groups(d_v, length).astype(dtype),
        jnp.where(g > chunks.FLOOR, d_g, 0.0),
        d_initial.reshape(initial_state.shape),
        None,
    )


attend.defvjp(_forward, _backward)


class Middle(NamedTuple):
    """Decays across the middles of P pieces: keys of the first halves, queries of the second."""

    keys: Float[Array, "... P h K"]
    queries: Float[Array, "... P h K"]


def _middles(sums: Sums):
    """A `Middle` for each size of halves, from single tokens up."""
    half = 1
    while 2 * half <= sums.coarse.shape[-2]:
        first, second = (Sums(*(_halves(part, half)[at] for part in sums)) for at in (0, 1))
        middle = first[..., -1:, :]
        yield half, Middle(jnp.exp(middle - first), jnp.exp(second - middle))
        half *= 2


def _halves(x, half: int):
    """[..., L, K] to the first and second halves [..., L / (2 half), half, K] of its pieces."""
    x = x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _scores(q, k, sums: Sums) -> Float[Array, "M B H R L L"]:
    """sum_d q_id k_jd exp(G_id - G_jd) for j <= i, else 0."""
    shape = sums.coarse.shape
    scores = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1)
    scores = jnp.broadcast_to(scores, shape[:-1])[..., None, None]
    for half, decays in _middles(sums):
        across = product(
            "mbhrpik,mbhrpjk->mbhrpij",
            scaled(_halves(q, half)[1], decays.queries),
            scaled(_halves(k, half)[0], decays.keys),
        )
        first, second = scores[..., 0::2, :, :], scores[..., 1::2, :, :]
        upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        scores = jnp.concatenate([upper, jnp.concatenate([across, second], axis=-1)], axis=-2)
    return scores[..., 0, :, :]


def _scores_gradients(q, k, sums: Sums, d_scores):
    """fp32 [M, B, H, R, L, K] gradients of `_scores` in q and k, without those of i = j."""
    shape = sums.coarse.shape
    d_q, d_k = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    for half, decays in _middles(sums):
        d_across = _diagonal_blocks(d_scores, 2 * half)[..., half:, :half].astype(q.dtype)
        keys = scaled(_halves(k, half)[0], decays.keys)
        queries = scaled(_halves(q, half)[1], decays.queries)
        second = decays.queries * product("mbhrpij,mbhrpjk->mbhrpik", d_across, keys)
        first = decays.keys * product("mbhrpij,mbhrpik->mbhrpjk", d_across, queries)
        nothing = jnp.zeros_like(first)
        d_q += jnp.stack([nothing, second], axis=-3).reshape(shape)
        d_k += jnp.stack([first, nothing], axis=-3).reshape(shape)
    return d_q, d_k


def _diagonal_blocks(x, size: int):
    """[..., L, L] to its blocks on the diagonal [..., L / size, size, size]."""
    pieces = x.shape[-1] // size
    x = x.reshape(*x.shape[:-2], pieces, size, pieces, size)
    return jnp.moveaxis(jnp.diagonal(x, axis1=-4, axis2=-2), -1, -3)
