"""One chunk of the TPU kernel, with a decay of each key feature: functions of arrays in VMEM.

As `xla_vector`, halves within halves, but each size of halves is one product of the whole chunk.
gates: fp32 log decays [L, K]; masks, fp32 [1, 8, L]: rows INDEX, READ, WRITE and KEEP of
`mosaic_tpu_scalar`, here 0 or 1.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.gated_linear_attention.mosaic_tpu_scalar import (
    INDEX,
    KEEP,
    READ,
    ROWS,
    WRITE,
    dot,
    places,
    row_sums,
    scaled,
)


class Decays(NamedTuple):
    """Between tokens and states; with `pair`, a mask, between tokens."""

    pair: Float[Array, "L L"]
    read: Float[Array, "L K"]
    write: Float[Array, "L K"]
    keep: Float[Array, "K 1"]
    keep_row: Float[Array, "1 K"]


def _sums(which, parts, over=(1, 0)):
    """Exact products of an array of zeros and ones with fp32 log decays in three bf16 parts."""
    return sum(dot(which.astype(jnp.bfloat16), part, over) for part in parts)


def _parts(g):
    """Three bf16 arrays whose sum is fp32 g."""
    parts = []
    for _ in range(3):
        parts.append(g.astype(jnp.bfloat16))
        g = g - parts[-1].astype(jnp.float32)
    return parts


def _decays(parts, masks) -> Decays:
    (masks,) = masks
    columns = masks.T
    size = masks.shape[1]
    i, j = places(size)
    pair = (j <= i) & (columns[:, INDEX : INDEX + 1] == masks[INDEX : INDEX + 1, :])
    keep = masks[KEEP : KEEP + 1, :1]
    ones = jnp.ones((size, ROWS), jnp.float32)
    column = sum(dot(part, ones.astype(jnp.bfloat16), (0, 0)) for part in parts)[:, :1]
    return Decays(
        pair.astype(jnp.float32),
        columns[:, READ : READ + 1] * jnp.exp(_sums(j <= i, parts)),
        columns[:, WRITE : WRITE + 1] * jnp.exp(_sums(j > i, parts)),
        keep * jnp.exp(column),
        keep * jnp.exp(_sums(ones, parts, (0, 0))[:1]),
    )


def _levels(size: int, parts):
    """For each size of halves: decays [L, K] to the middle of its piece from each token, whether
    the token is in a second half [L, 1], and which pairs share a piece [L, L].
    """
    i, j = places(size)
    half = 1
    while half < size:
        second = (i // half) % 2 == 1
        between = (i // half == j // half) & jnp.where(second, j <= i, j > i)
        yield jnp.exp(_sums(between, parts)), second[:, :1], i // (2 * half) == j // (2 * half)
        half *= 2


def _scores(q, k, parts):
    """sum_d q_id k_jd exp(G_id - G_jd) for j <= i."""
    i, j = places(q.shape[0])
    itself = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=1, keepdims=True)
    scores = jnp.where(i == j, itself, 0.0)
    for decay, second, piece in _levels(q.shape[0], parts):
        queries = scaled(q, jnp.where(second, decay, 0.0))
        keys = scaled(k, jnp.where(second, 0.0, decay))
        scores += jnp.where(piece, dot(queries, keys, (1, 1)), 0.0)
    return scores


def _scores_gradients(q, k, parts, d_scores):
    """Gradients of `_scores` in q and k, without those of i = j."""
    d_q = d_k = jnp.zeros(q.shape, jnp.float32)
    for decay, second, piece in _levels(q.shape[0], parts):
        to_queries, to_keys = jnp.where(second, decay, 0.0), jnp.where(second, 0.0, decay)
        across = jnp.where(piece, d_scores, 0.0).astype(q.dtype)
        d_q += to_queries * dot(across, scaled(k, to_keys))
        d_k += to_keys * dot(across, scaled(q, to_queries), (0, 0))
    return d_q, d_k


def advance(k, v, gates, state):
    """The fp32 state after the chunk; gates: (log decays, masks)."""
    d = _decays(_parts(gates[0]), gates[1])
    return d.keep * state + dot(scaled(k, d.write), v, (0, 0))


def attend(q, k, v, gates, state, scale: float):
    """Outputs of the chunk in fp32, from the fp32 state before it; and the state after it."""
    parts = _parts(gates[0])
    d = _decays(parts, gates[1])
    weights = (d.pair * _scores(q, k, parts)).astype(v.dtype)
    o = dot(weights, v) + dot(scaled(q, d.read), state.astype(q.dtype))
    return scale * o, d.keep * state + dot(scaled(k, d.write), v, (0, 0))


def gradients(q, k, v, gates, d_o, state, d_state, scale: float):
    """fp32 gradients of q, k, v, of the state before the chunk, and of the log decays [L, K]."""
    parts, dtype = _parts(gates[0]), q.dtype
    d = _decays(parts, gates[1])
    narrow = (scale * d_o.astype(jnp.float32)).astype(dtype)
    d_after = d_state.astype(dtype)
    weights = (d.pair * _scores(q, k, parts)).astype(dtype)
    d_v = dot(weights, narrow, (0, 0)) + dot(scaled(k, d.write), d_after)
    d_scores = d.pair * dot(narrow, v, (1, 1))
    d_q_pairs, d_k_pairs = _scores_gradients(q, k, parts, d_scores)
    d_q_state = d.read * dot(narrow, state, (1, 1))
    d_k_state = d.write * dot(v, d_after, (1, 1))
    i, j = places(q.shape[0])
    itself = jnp.sum(jnp.where(i == j, d_scores, 0.0), axis=1, keepdims=True)
    wide_q, wide_k = q.astype(jnp.float32), k.astype(jnp.float32)
    d_q = d_q_pairs + d_q_state + itself * wide_k
    d_k = d_k_pairs + d_k_state + itself * wide_q
    d_before = d.keep * d_state + dot(scaled(q, d.read), narrow, (0, 0))

    later = wide_q * (d_q_pairs + d_q_state) - wide_k * d_k_pairs
    kept = row_sums(state.astype(jnp.float32) * d_after.astype(jnp.float32))[:1]
    d_g = dot((j >= i).astype(jnp.float32), later)
    d_g += dot((j < i).astype(jnp.float32), wide_k * d_k_state) + d.keep_row * kept
    return d_q, d_k, d_v, d_before, d_g
