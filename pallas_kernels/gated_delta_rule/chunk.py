"""One chunk of the gated delta rule as products of matrices of one head: what chunk forms share.

C tokens, K key features, V value features; G is the log decay cumulated within the chunk, in two
parts (`Sums`), with G_C its last value. Everything is fp32 but the operands of large products,
which `dot` rounds. Numbers a token come as rows [1, C], the layout that memory likes.

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

from pallas_kernels._core.decay_sums import Sums
from pallas_kernels._core.recurrence import Documents

LEAST = -60.0  # log decay, after which nothing is left that fp32 could add to a new value
SUBLANES = 8  # rows of a TPU's registers, which reshapes must leave together


class Parts(NamedTuple):
    """What a chunk's tokens do to whatever state comes in, beside v.

    read: scale exp(G) q, of the incoming state. predict: exp(G) k, the same for the prediction.
    write: exp(G_C - G) k. keep: exp(G_C), by rows of the state. scores: of queries on keys, with
    decay, causal. correct: (I + L)^-1 diag(beta), where L_ij = beta_i k_i k_j exp(G_i - G_j) for
    j < i: from the errors of predictions by the incoming state to what the tokens write.
    """

    read: Float[Array, "C K"]
    predict: Float[Array, "C K"]
    write: Float[Array, "C K"]
    scores: Float[Array, "C C"]
    correct: Float[Array, "C C"]
    keep: Float[Array, "k 1"]


def prepare(q, k, G, beta, documents, *, scale: float, dtype, invert: Callable) -> Parts:
    """The parts of a chunk, from q, k [C, K], G None or Sums of [1, C] or [C, K], beta, documents.

    dtype: of the operands of large products. invert: fp32 L [C, C] -> (I + L)^-1.
    C is a power of two, and at least 16.
    """
    C = q.shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    is_last = lax.broadcasted_iota(jnp.int32, (C, 1), 0) == C - 1
    earlier, from_before, to_end, through = row > column, None, ~is_last, None
    if documents is not None:
        document, last = as_column(documents), last_of(documents)
        earlier &= document == documents
        from_before, to_end, through = document == 0.0, to_end & (document == last), last == 0.0
    if G is not None and G.fine.shape[0] == C:
        q_k, k_k = (jnp.where(earlier, x, 0.0) for x in vector_products(q, k, G, dtype))
        end = G[C - 1 :]
        keep = as_column(masked_exp(end.total(), through))
    else:
        row_G = Sums(*[jnp.zeros((1, C), jnp.float32)] * 2) if G is None else G
        G, end = (Sums(*map(of, row_G)) for of in (as_column, last_of))
        between = masked_exp(G - row_G, earlier)
        q_k, k_k = (between * dot(left, k, "nt", dtype) for left in (q, k))
        keep = masked_exp(end.total(), through)
    into = masked_exp(G.total(), from_before)
    # Exponents that are always 0 are left out: their gradient would be the others' rounding.
    out_of = jnp.where(is_last, 1.0, masked_exp(end - G, to_end))
    self = jnp.where(row == column, jnp.sum(q * k, axis=1, keepdims=True), 0.0)
    correct = unit_lower_inverse(as_column(beta) * k_k, invert) * beta
    return Parts(scale * into * q, into * k, out_of * k, scale * (q_k + self), correct, keep)


def advance(state, parts: Parts, v, dtype):
    """(state after the chunk, o [C, V]) for the state [K, V] before it and v [C, V]."""
    error = v - dot(parts.predict, state, "nn", dtype)
    written = dot(parts.correct, error, "nn", dtype)
    o = dot(parts.read, state, "nn", dtype) + dot(parts.scores, written, "nn", dtype)
    return parts.keep * state + dot(parts.write, written, "tn", dtype), o


def gates(g, beta, documents: Documents | None):
    """g from LEAST, so that sums of it stay numbers, and 0 at padding; beta 0 at padding."""
    if g is not None:
        g = jnp.maximum(g, LEAST)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def vector_products(q, k, G, dtype):
    """sum_d q_id k_jd exp(G_id - G_jd) for j < i, and the same of k and k; 0 elsewhere.

    The pairs of neighbouring blocks of 1, 2, 4, ... tokens take exponents from the first token of
    the later block: none is above 0, however strong the decay, so that none overflows.
    """
    q_k = k_k = jnp.zeros((len(q), len(q)), jnp.float32)
    for pairs, decay in _levels(G):
        right = decay * k
        q_k += jnp.where(pairs, dot(decay * q, right, "nt", dtype), 0.0)
        k_k += jnp.where(pairs, dot(right, right, "nt", dtype), 0.0)
    return q_k, k_k


def _levels(G):
    """For each size of blocks, a mask [C, C] of the pairs, and exp(-|G - reference|) [C, K].

    C is a power of two.
    """
    C = len(G.fine)
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    token = lax.broadcasted_iota(jnp.int32, G.fine.shape, 0)
    size = 1
    while size < C:
        from_reference = G - Sums(*(_first_of_later(x, size) for x in G))
        later = token // size % 2 == 1
        pairs = (row // size % 2 == 1) & (column // size == row // size - 1)
        yield pairs, jnp.exp(jnp.where(later, from_reference, -from_reference))
        size *= 2


def _first_of_later(x, size: int):
    """For each row, that with which the later block of `size` of its pair of blocks begins."""
    span = max(2 * size, SUBLANES)
    spans = x.reshape(-1, span, x.shape[1])
    place = lax.broadcasted_iota(jnp.int32, spans.shape, 1)
    found = jnp.broadcast_to(spans[:, size : size + 1], spans.shape)
    for start in range(2 * size, span, 2 * size):
        found = jnp.where(place < start, found, spans[:, start + size : start + size + 1])
    return found.reshape(x.shape)


def _vector_products_forward(q, k, G, dtype):
    return vector_products(q, k, G, dtype), (q, k, G)


def _vector_products_backward(dtype, inputs, d_products):
    """Decays again. The gradient in G is left d_left - right d_right (arXiv 2312.06635, C)."""
    q, k, G = inputs
    d_q, d_left, d_right = (jnp.zeros(k.shape, jnp.float32) for _ in range(3))
    for pairs, decay in _levels(G):
        d_q_k, d_k_k = (jnp.where(pairs, d, 0.0) for d in d_products)
        left, right = decay * q, decay * k
        d_q += decay * dot(d_q_k, right, "nn", dtype)
        d_left += decay * dot(d_k_k, right, "nn", dtype)
        d_right += decay * (dot(d_q_k, left, "tn", dtype) + dot(d_k_k, right, "tn", dtype))
    d_G = Sums(jnp.zeros_like(G.coarse), q * d_q + k * d_left - k * d_right)
    return d_q, d_left + d_right, d_G


vector_products.defvjp(_vector_products_forward, _vector_products_backward)
