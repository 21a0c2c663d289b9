"""One chunk of the gated delta rule as products of matrices of one head: what chunk forms share.

C tokens, K key features, V value features; G is the log decay cumulated within the chunk, with G_C
its last value. Everything is fp32 but the operands of large products, which `dot` rounds. Numbers a
token come as rows [1, C], the layout that memory likes.

Per document: `documents` counts, for each token, the documents started since the token before the
chunk. The state that comes in is for tokens with 0, the one that goes out is of the last document.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._core.recurrence import Documents

BLOCK = 16  # tokens for which exponents of decays are taken pair by pair


class Parts(NamedTuple):
    """What a chunk's tokens do to whatever state comes in, beside v and beta.

    read: scale exp(G) q, of the incoming state. predict: exp(G) k, the same for the prediction.
    write: exp(G_C - G) k. keep: exp(G_C), by rows of the state. scores: of queries on keys, with
    decay, causal. inverse: (I + L)^-1, where L_ij = beta_i k_i k_j exp(G_i - G_j), j < i.
    """

    read: Float[Array, "C K"]
    predict: Float[Array, "C K"]
    write: Float[Array, "C K"]
    scores: Float[Array, "C C"]
    inverse: Float[Array, "C C"]
    keep: Float[Array, "k 1"]


def prepare(
    q, k, G, beta, documents, *, scale: float, dtype, invert: Callable, within: Callable
) -> Parts:
    """The parts of a chunk, from q, k [C, K], G None, [1, C] or [C, K], beta, documents [1, C].

    dtype: of the operands of large products. invert: fp32 L [C, C] -> (I + L)^-1. within: see
    `vector_products`.
    """
    C = q.shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    causal, from_before, to_end = row >= column, None, None
    through = None
    if documents is not None:
        document = as_column(documents)
        last = last_of(documents)
        causal &= document == documents
        from_before, to_end, through = document == 0.0, document == last, last == 0.0
    if G is None or G.shape[0] == 1:
        q_k, k_k = dot(q, k, "nt", dtype), dot(k, k, "nt", dtype)
        if G is None:
            G = jnp.zeros((1, C), jnp.float32)
        # Exponents that are 0 have no gradient: it would be a rounding error of the others.
        between = masked_exp(as_column(G) - G, causal & (row > column)) + jnp.where(
            row == column, 1.0, 0.0
        )
        q_k, k_k = q_k * between, k_k * between
        end, G = last_of(G), as_column(G)
    else:
        q_k, k_k = (jnp.where(causal, x, 0.0) for x in vector_products(q, k, G, dtype, within))
        end = G[C - 1 :]
    keep = masked_exp(end, through)
    if keep.shape[1] > 1:
        keep = as_column(keep)
    into = masked_exp(G, from_before)
    is_last = lax.broadcasted_iota(jnp.int32, (C, 1), 0) == C - 1
    to_end = ~is_last if to_end is None else to_end & ~is_last
    out_of = jnp.where(is_last, 1.0, masked_exp(end - G, to_end))
    inverse = unit_lower_inverse(as_column(beta) * jnp.where(row > column, k_k, 0.0), invert)
    return Parts(scale * into * q, into * k, out_of * k, scale * q_k, inverse, keep)


def advance(state, parts: Parts, v, beta, dtype):
    """(state after the chunk, o [C, V]) for the state before it, v [C, V] and beta [1, C]."""
    error = as_column(beta) * (v - dot(parts.predict, state, "nn", dtype))
    written = dot(parts.inverse, error, "nn", dtype)
    o = dot(parts.read, state, "nn", dtype) + dot(parts.scores, written, "nn", dtype)
    return parts.keep * state + dot(parts.write, written, "tn", dtype), o


def without_padding(g, beta, documents: Documents | None):
    """g and beta that change no state at padding: 0."""
    if documents is None:
        return g, beta
    real = documents.real[:, :, None]
    if g is not None:
        g = jnp.where(real.reshape(*real.shape[:2], *[1] * (g.ndim - 2)), g, 0.0)
    return g, jnp.where(real, beta, 0.0)


def documents_started(index: Int[Array, "B T"], size: int) -> Float[Array, "B n C"]:
    """How many documents started since the token before the chunk of `size` tokens, as fp32."""
    B, T = index.shape
    index = jnp.pad(index, ((0, 0), (0, -T % size)), mode="edge").reshape(B, -1, size)
    before = jnp.pad(index[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    return (index - before).astype(jnp.float32)


def as_column(row: Float[Array, "1 C"]) -> Float[Array, "C 1"]:
    """A row turned into a column by a masked sum, which every compiler takes."""
    size = row.shape[1]
    equal = lax.broadcasted_iota(jnp.int32, (size, size), 0) == lax.broadcasted_iota(
        jnp.int32, (size, size), 1
    )
    return jnp.sum(jnp.where(equal, row, 0.0), axis=1, keepdims=True)


def last_of(row: Float[Array, "1 C"]) -> Float[Array, "1 1"]:
    """The last number of a row."""
    place = lax.broadcasted_iota(jnp.int32, row.shape, 1)
    return jnp.sum(jnp.where(place == row.shape[1] - 1, row, 0.0), axis=1, keepdims=True)


def masked_exp(exponent, allowed):
    """exp where `allowed` (None: everywhere), else 0: the exponent may overflow there."""
    return jnp.exp(exponent if allowed is None else jnp.where(allowed, exponent, -jnp.inf))


CONTRACTED = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot(a, b, form: str, dtype):
    """a b ("nn"), a b^T ("nt") or a^T b ("tn") in fp32, of operands rounded to `dtype`."""
    left, right = CONTRACTED[form]
    exact = jnp.dtype(dtype) == jnp.float32
    return lax.dot_general(
        a.astype(dtype), b.astype(dtype), (((left,), (right,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _dot_forward(a, b, form, dtype):
    return dot(a, b, form, dtype), (a, b)


def _dot_backward(form, dtype, operands, d_out):
    a, b = operands
    if form == "nn":
        d_a, d_b = dot(d_out, b, "nt", dtype), dot(a, d_out, "tn", dtype)
    elif form == "nt":
        d_a, d_b = dot(d_out, b, "nn", dtype), dot(d_out, a, "tn", dtype)
    else:
        d_a, d_b = dot(b, d_out, "nt", dtype), dot(a, d_out, "nn", dtype)
    return d_a.astype(a.dtype), d_b.astype(b.dtype)


dot.defvjp(_dot_forward, _dot_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit_lower_inverse(lower, invert):
    """(I + lower)^-1 for a strictly lower triangular matrix, by `invert`."""
    return invert(lower)


def _inverse_forward(lower, invert):
    inverse = invert(lower)
    return inverse, inverse


def _inverse_backward(invert, inverse, d_inverse):
    product = dot(dot(inverse, d_inverse, "tn", jnp.float32), inverse, "nt", jnp.float32)
    return (-product,)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def vector_products(q, k, G, dtype, within: Callable):
    """sum_d q_id k_jd exp(G_id - G_jd) for j <= i, and the same of k and k; no exponent is > 0.

    within: `block_products`, or another function that gives the same.
    """
    C = q.shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    token = lax.broadcasted_iota(jnp.int32, (C, 1), 0)
    products = []
    for left, inner in zip((q, k), within(q, k, G), strict=True):
        rows = [jnp.zeros((BLOCK, C), jnp.float32)]
        for start in range(BLOCK, C, BLOCK):
            block = slice(start, start + BLOCK)
            before = masked_exp(G[start : start + 1] - G, token < start) * k
            after = jnp.exp(G[block] - G[start : start + 1]) * left[block]
            rows.append(dot(after, before, "nt", dtype))
        self = jnp.sum(left * k, axis=1, keepdims=True)
        products.append(jnp.concatenate(rows) + inner + jnp.where(row == column, self, 0.0))
    return tuple(products)


@jax.custom_vjp
def block_products(q, k, G):
    """`vector_products` for j < i in one block of BLOCK tokens, 0 elsewhere: pair by pair."""
    decays = _decays(G)
    return tuple(
        _from_blocks(jnp.sum(_blocks(left)[:, :, None] * _blocks(k)[:, None] * decays, axis=3))
        for left in (q, k)
    )


def _blocks(x):
    """[b, BLOCK, K]"""
    return x.reshape(-1, BLOCK, x.shape[1])


def _decays(G):
    """exp(G_i - G_j) [b, i, j, K] of the pairs j < i of all blocks b."""
    later, token = (lax.broadcasted_iota(jnp.int32, (1, BLOCK, BLOCK, 1), axis) for axis in (1, 2))
    return masked_exp(_blocks(G)[:, :, None] - _blocks(G)[:, None], token < later)


def _from_blocks(x):
    """[b, BLOCK, BLOCK] as the diagonal blocks of a matrix [C, C]."""
    count = len(x)
    own = jnp.eye(count, dtype=x.dtype)[:, None, :, None]
    return (x[:, :, None] * own).reshape(count * BLOCK, count * BLOCK)


def _block_products_forward(q, k, G):
    return block_products(q, k, G), (q, k, G)


def _block_products_backward(inputs, d_products):
    """Decays again. The gradient in G is left d_left - right d_right (arXiv 2312.06635, 4.2)."""
    q, k, G = inputs
    decays, count = _decays(G), len(_blocks(G))
    d_lefts, d_right = [], 0.0
    for left, d_product in zip((q, k), d_products, strict=True):
        d_blocks = d_product.reshape(count, BLOCK, count, BLOCK)
        d_blocks = jnp.moveaxis(jnp.diagonal(d_blocks, axis1=0, axis2=2), 2, 0)
        weights = d_blocks[..., None] * decays
        d_lefts.append(jnp.sum(weights * _blocks(k)[:, None], axis=2).reshape(q.shape))
        d_right += jnp.sum(weights * _blocks(left)[:, :, None], axis=1).reshape(q.shape)
    d_q, d_left = d_lefts
    return d_q, d_left + d_right, q * d_q + k * d_left - k * d_right


block_products.defvjp(_block_products_forward, _block_products_backward)


def of_block(x, j: int):
    """For each row of x, row j of its block of BLOCK rows."""
    blocks = x.reshape(-1, BLOCK, x.shape[1])
    return jnp.broadcast_to(blocks[:, j : j + 1], blocks.shape).reshape(x.shape)
