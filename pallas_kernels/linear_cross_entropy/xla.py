"""Cross-entropy of a linear classifier in chunks of logits, by rows or by vocabulary.

Arrays are laid out as hidden [S, R, D]: S shards of R rows each, chunks cut along R or along V.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Options(NamedTuple):
    """What is fixed at compile time."""

    soft_cap: float | None
    z_loss: float
    chunk_logits: int


class Scores(NamedTuple):
    """What each row contributes."""

    label_logit: Float[Array, "S R"]
    lse: Float[Array, "S R"]
    correct: Bool[Array, "S R"]  # the label's logit is higher than all others


class Chunks(NamedTuple):
    """`count` slices of `size` cover `length`; when not divisible, the last overlaps its neighbour.

    Overlap in place of padding: no copy of the rows or of the weight is made.
    """

    count: int
    size: int
    length: int

    @classmethod
    def cover(cls, length: int, most: int) -> "Chunks":
        count = -(-length // max(1, min(most, length)))
        return cls(count, -(-length // count), length)

    def start(self, index):
        return jnp.minimum(index * self.size, self.length - self.size)

    def fresh(self, index) -> Bool[Array, " size"]:
        """Which entries of slice `index` no earlier slice held."""
        return self.start(index) + jnp.arange(self.size, dtype=jnp.int32) >= index * self.size


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def by_rows(hidden, weight, labels, weights, options: Options):
    """(total, sums), scanning over rows; gradients are found in the forward pass.

    The total is a scalar, so the gradients of hidden and weight are its cotangent times values
    that the forward pass can compute while a chunk's logits are alive: three matrix products and
    no recomputation (Liger Kernel, arXiv:2410.10989, section 3.2). The weight gradient is summed
    in float32 per shard, and over shards once at the end.
    """
    return _reduce(_row_scores(hidden, weight, labels, options), weights, options)


def _by_rows_forward(hidden, weight, labels, weights, options):
    chunks = _row_chunks(hidden, weight, options)
    compute_weight = weight.astype(hidden.dtype)

    def gradients(hidden, labels, weights):
        logits, is_label = _logits(hidden, compute_weight, labels, options)
        scores = _scores(logits, is_label)
        dlogits = _dlogits(logits, is_label, scores.lse, weights, options).astype(hidden.dtype)
        dhidden = jnp.einsum(
            "srv,vd->srd", dlogits, compute_weight, preferred_element_type=jnp.float32
        )
        dweight = jnp.einsum("srv,srd->svd", dlogits, hidden, preferred_element_type=jnp.float32)
        return scores, dhidden.astype(hidden.dtype), dweight

    def body(carry, index):
        scores, dhidden, dweight = carry
        start = chunks.start(index)
        rows = [_slice(x, start, chunks.size) for x in (hidden, labels, weights)]
        rows[2] = jnp.where(chunks.fresh(index)[None], rows[2], 0.0)
        new_scores, new_dhidden, new_dweight = gradients(*rows)
        scores = jax.tree.map(lambda old, new: _write(old, new, start), scores, new_scores)
        dhidden = _write(dhidden, _slice(dhidden, start, chunks.size) + new_dhidden, start)
        return (scores, dhidden, dweight + new_dweight), None

    if chunks.count == 1:
        scores, dhidden, dweight = gradients(hidden, labels, weights)
    else:
        dweight = jnp.zeros((hidden.shape[0], *weight.shape), jnp.float32)
        carry = (_empty_scores(labels), jnp.zeros_like(hidden), dweight)
        (scores, dhidden, dweight), _ = lax.scan(body, carry, jnp.arange(chunks.count))
    dweight = jnp.sum(dweight, axis=0).astype(weight.dtype)
    return _reduce(scores, weights, options), (dhidden, dweight)


def _by_rows_backward(options, residuals, cotangents):
    total = cotangents[0]  # the sums are metrics; their cotangents are dropped
    scaled = [(x.astype(jnp.float32) * total).astype(x.dtype) for x in residuals]
    return (*scaled, None, None)


by_rows.defvjp(_by_rows_forward, _by_rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def by_vocabulary(hidden, weight, labels, weights, options: Options):
    """(total, sums), scanning over slices of the vocabulary with an online logsumexp.

    The backward pass computes each chunk's logits again: four matrix products, but rows never
    leave their device and the weight gradient is summed over devices once.
    """
    return _by_vocabulary_forward(hidden, weight, labels, weights, options)[0]


def _by_vocabulary_forward(hidden, weight, labels, weights, options):
    chunks = _vocabulary_chunks(hidden, weight, options)

    def body(carry, index):
        highest_other, total, label_logit, highest = carry
        logits, is_label, _ = _vocabulary_slice(hidden, weight, labels, chunks, index, options)
        other = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)
        new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1))
        exponentials = jnp.exp(logits - new_highest[..., None])
        total = total * jnp.exp(highest - new_highest) + jnp.sum(exponentials, axis=-1)
        label_logit = label_logit + jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
        return (jnp.maximum(highest_other, other), total, label_logit, new_highest), None

    lowest = jnp.full(labels.shape, -jnp.inf)
    zeros = jnp.zeros(labels.shape)
    carry, _ = lax.scan(body, (lowest, zeros, zeros, lowest), jnp.arange(chunks.count))
    highest_other, total, label_logit, highest = carry
    scores = Scores(label_logit, highest + jnp.log(total), label_logit > highest_other)
    residuals = (hidden, weight, labels, weights, scores.lse)
    return _reduce(scores, weights, options), residuals


def _by_vocabulary_backward(options, residuals, cotangents):
    hidden, weight, labels, weights, lse = residuals
    weights = weights * cotangents[0]
    chunks = _vocabulary_chunks(hidden, weight, options)

    def body(carry, index):
        dhidden, dweight = carry
        logits, is_label, rows = _vocabulary_slice(hidden, weight, labels, chunks, index, options)
        dlogits = _dlogits(logits, is_label, lse, weights, options)
        dlogits = jnp.where(chunks.fresh(index)[None, None], dlogits, 0.0).astype(hidden.dtype)
        dhidden += jnp.einsum("srv,vd->srd", dlogits, rows, preferred_element_type=jnp.float32)
        new = jnp.einsum("srv,srd->vd", dlogits, hidden, preferred_element_type=jnp.float32)
        start = chunks.start(index)
        old = lax.dynamic_slice_in_dim(dweight, start, chunks.size, 0)
        new = old + new.astype(weight.dtype)  # one of the two is zero: no rounding
        return (dhidden, lax.dynamic_update_slice_in_dim(dweight, new, start, 0)), None

    carry = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(weight))
    (dhidden, dweight), _ = lax.scan(body, carry, jnp.arange(chunks.count))
    return dhidden.astype(hidden.dtype), dweight, None, None


by_vocabulary.defvjp(_by_vocabulary_forward, _by_vocabulary_backward)


def scores_by_rows(hidden, weight, labels, options: Options) -> Scores:
    """Scores of each row without gradients, scanning over rows."""
    return _row_scores(hidden, weight, labels, options)


def _row_scores(hidden, weight, labels, options) -> Scores:
    chunks = _row_chunks(hidden, weight, options)
    compute_weight = weight.astype(hidden.dtype)

    def score(hidden, labels):
        return _scores(*_logits(hidden, compute_weight, labels, options))

    def body(scores, index):
        start = chunks.start(index)
        new = score(_slice(hidden, start, chunks.size), _slice(labels, start, chunks.size))
        return jax.tree.map(lambda old, new: _write(old, new, start), scores, new), None

    if chunks.count == 1:
        return score(hidden, labels)
    return lax.scan(body, _empty_scores(labels), jnp.arange(chunks.count))[0]


def _row_chunks(hidden, weight, options) -> Chunks:
    return Chunks.cover(hidden.shape[1], options.chunk_logits // (hidden.shape[0] * len(weight)))


def _vocabulary_chunks(hidden, weight, options) -> Chunks:
    return Chunks.cover(len(weight), options.chunk_logits // (hidden.shape[0] * hidden.shape[1]))


def _vocabulary_slice(hidden, weight, labels, chunks, index, options):
    """Logits, which of them are the label's, and the weight rows of one slice of the vocabulary."""
    start = chunks.start(index)
    rows = lax.dynamic_slice_in_dim(weight, start, chunks.size, 0).astype(hidden.dtype)
    logits, is_label = _logits(hidden, rows, labels - start, options)
    fresh = chunks.fresh(index)[None, None]
    return jnp.where(fresh, logits, -jnp.inf), is_label & fresh, rows


def _logits(hidden, weight, labels, options):
    """Float32 logits [S, R, V], soft-capped, and which of them is the label's."""
    logits = jnp.einsum("srd,vd->srv", hidden, weight, preferred_element_type=jnp.float32)
    if options.soft_cap is not None:
        logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
    return logits, jax.nn.one_hot(labels, len(weight), dtype=bool)


def _scores(logits, is_label) -> Scores:
    label_logit = jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1)
    highest_other = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    highest = jnp.max(logits, axis=-1)
    lse = highest + jnp.log(jnp.sum(jnp.exp(logits - highest[..., None]), axis=-1))
    return Scores(label_logit, lse, label_logit > highest_other)


def _dlogits(logits, is_label, lse, weights, options):
    """Gradient of the total in the logits before the soft-cap, float32."""
    scale = weights * (1.0 + 2.0 * options.z_loss * lse)
    probabilities = jnp.exp(logits - lse[..., None])
    dlogits = scale[..., None] * probabilities - jnp.where(is_label, weights[..., None], 0.0)
    if options.soft_cap is not None:
        dlogits = dlogits * (1.0 - jnp.square(logits / options.soft_cap))
    return dlogits


def _reduce(scores: Scores, weights, options):
    sums = {
        "loss_sum": jnp.sum(weights * (scores.lse - scores.label_logit)),
        "z_loss_sum": options.z_loss * jnp.sum(weights * jnp.square(scores.lse)),
        "weight_sum": jnp.sum(weights),
        "correct_sum": jnp.sum(jnp.where(scores.correct, weights, 0.0)),
    }
    return sums["loss_sum"] + sums["z_loss_sum"], sums


def _empty_scores(labels) -> Scores:
    zeros = jnp.zeros(labels.shape)
    return Scores(zeros, zeros, jnp.zeros(labels.shape, bool))


def _slice(x, start, size):
    return lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _write(x, piece, start):
    return lax.dynamic_update_slice_in_dim(x, piece, start, axis=1)
