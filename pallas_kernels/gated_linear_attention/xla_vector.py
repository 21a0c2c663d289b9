"""Linear attention in chunks with a decay of each key feature, without any exponent above 0.

The decay between two tokens is split at a token between them: a chunk is halved, and its halves,
down to single tokens; pairs across the middles of all pieces of a size are one product of scaled
queries and scaled keys, in which other pairs are masked.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels._core import decay_sums
from pallas_kernels._core.decay_sums import Sums
from pallas_kernels.gated_linear_attention import chunks
from pallas_kernels.gated_linear_attention.chunks import Masks, product, scaled


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
    sums = decay_sums.sums(jnp.where(mask.gate[..., None], g, 0.0), axis=4)
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
        jnp.where(g > decay_sums.FLOOR, d_g, 0.0),
        d_initial.reshape(initial_state.shape),
        None,
    )


attend.defvjp(_forward, _backward)


class Level(NamedTuple):
    """Pairs of tokens in different halves of the same piece of a chunk.

    queries, keys: decays between the middle of its piece and each token of a second or first half,
    0 for the other. pair: which tokens share a piece.
    """

    queries: Float[Array, "M B H R L K"]
    keys: Float[Array, "M B H R L K"]
    pair: Bool[Array, "1 1 1 1 L L"]


def _levels(sums: Sums):
    """A `Level` for each size of pieces, from two tokens to the chunk."""
    shape = sums.coarse.shape
    place = jnp.arange(shape[-2])
    half = 1
    while half < shape[-2]:
        pieces = Sums(*(x.reshape(*shape[:-2], -1, 2 * half, shape[-1]) for x in sums))
        exponent = pieces - pieces[..., half - 1 : half, :]  # from the middle, at most 0 after it
        decay = jnp.exp(-jnp.abs(exponent)).reshape(shape)
        second = ((place // half) % 2 == 1).reshape(1, 1, 1, 1, -1, 1)
        piece = place // (2 * half)
        yield Level(
            jnp.where(second, decay, 0.0),
            jnp.where(second, 0.0, decay),
            (piece[:, None] == piece[None])[None, None, None, None],
        )
        half *= 2


def _scores(q, k, sums: Sums) -> Float[Array, "M B H R L L"]:
    """sum_d q_id k_jd exp(G_id - G_jd) for j <= i, else 0."""
    itself = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1, keepdims=True)
    scores = jnp.eye(q.shape[-2])[None, None, None, None] * itself
    for level in _levels(sums):
        across = product("mbhrik,mbhrjk->mbhrij", scaled(q, level.queries), scaled(k, level.keys))
        scores += jnp.where(level.pair, across, 0.0)
    return scores


def _scores_gradients(q, k, sums: Sums, d_scores):
    """fp32 [M, B, H, R, L, K] gradients of `_scores` in q and k, without those of i = j."""
    d_q = d_k = jnp.zeros(sums.coarse.shape, jnp.float32)
    for level in _levels(sums):
        across = jnp.where(level.pair, d_scores, 0.0).astype(q.dtype)
        d_q += level.queries * product("mbhrij,mbhrjk->mbhrik", across, scaled(k, level.keys))
        d_k += level.keys * product("mbhrij,mbhrik->mbhrjk", across, scaled(q, level.queries))
    return d_q, d_k
