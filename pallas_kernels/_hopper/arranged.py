"""Rows of the recurrent ops as the Hopper kernels take them."""

import jax.numpy as jnp

from pallas_kernels._hopper.prepare import PAIR
from pallas_kernels._hopper.tiles import CHUNK, TILE

LEAST = -60.0  # log decay, after which nothing is left; of minus infinity there are no differences
SMALLEST = 1e-15  # of beta, by whose square the backward pass divides


def warpgroups(features: int, heads: int) -> int:
    """Tiles of value features a processor takes: two where that leaves none without work.

    heads: of all rows together.
    """
    return 2 if features % (2 * TILE) == 0 and heads >= 64 else 1


def padded(x, length: int):
    """`x` [B, T, ...] with zeros up to `length` tokens."""
    missing = length - x.shape[1]
    return x if not missing else jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))


def arranged(q, k, v, g, beta, initial_state, documents):
    """Whole pairs of chunks; gates as [B, N, T]; transposed states; a beta to divide by.

    A decay a key feature stays as it is, [B, T, N, K]: `vector_prepare` cuts it at LEAST.
    """
    length = -(-q.shape[1] // (PAIR * CHUNK)) * PAIR * CHUNK
    if documents is not None:
        documents = jnp.pad(documents, ((0, 0), (0, length - documents.shape[1])), mode="edge")
    q, k, v = (padded(x, length) for x in (q, k, v))
    if g is None:
        g = jnp.zeros((v.shape[0], v.shape[2], length), jnp.float32)
    else:
        g = padded(g, length)
        g = jnp.swapaxes(jnp.maximum(g, LEAST), 1, 2) if g.ndim == 3 else g
    if beta is not None:
        beta = jnp.swapaxes(padded(beta, length), 1, 2)
        beta = jnp.where(jnp.abs(beta) < SMALLEST, SMALLEST, beta)
    return q, k, v, g, beta, jnp.swapaxes(initial_state, 2, 3), documents


def over_shared(x, heads: int):
    """The sum [B, T, H, K] of x [B, T, N, K] over the value heads that share a key head."""
    if x.shape[2] == heads:
        return x
    x = x.reshape(*x.shape[:2], heads, -1, x.shape[3])
    return jnp.sum(x, axis=3, dtype=jnp.float32).astype(x.dtype)
