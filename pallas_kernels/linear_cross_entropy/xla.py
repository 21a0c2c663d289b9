"""Cross-entropy of a linear classifier in chunks of logits: hidden [R, D] cut by rows R, or V."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels._core import compat
from pallas_kernels.linear_cross_entropy.ref import Options


class Scores(NamedTuple):
    """What each row contributes."""

    label_logit: Float[Array, "R"]
    lse: Float[Array, "R"]
    correct: Bool[Array, "R"]  # no logit is higher than the label's


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

    def fresh(self, index, shape: tuple[int, ...]) -> Bool[Array, "..."]:
        """Which entries of slice `index` no earlier slice held, along the last axis of `shape`."""
        place = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
        return self.start(index) + place >= index * self.size


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def by_rows(hidden, weight, labels, weights, options: Options):
    """(total, sums), scanning over rows; gradients are found in the forward pass.

    The total is a scalar, so the gradients of hidden and weight are its cotangent times values
    that the forward pass can compute while a chunk's logits are alive: three matrix products and
    no recomputation (Liger Kernel, arXiv:2410.10989, section 3.2). The weight gradient is summed
    in float32.
    """
    return _reduce(_row_scores(hidden, weight, labels, options), weights, options)


def _by_rows_forward(hidden, weight, labels, weights, options):
    chunks = _row_chunks(hidden, weight, options)
    compute_weight = weight.astype(hidden.dtype)

    def gradients(hidden, labels, weights):
        logits = _logits(hidden, compute_weight, options)
        scores, exponentials, total = _scores(logits, labels)
        scale = _z_scale(scores.lse, weights, options) / total
        # Scaling the exponentials at hand is cheaper than a second exp over the chunk.
        dlogits = _dlogits(logits, exponentials * scale[..., None], labels, weights, options)
        dlogits = dlogits.astype(hidden.dtype)
        dhidden = jnp.einsum(
            "rv,vd->rd", dlogits, compute_weight, preferred_element_type=jnp.float32
        )
        dweight = jnp.einsum("rv,rd->vd", dlogits, hidden, preferred_element_type=jnp.float32)
        return scores, dhidden.astype(hidden.dtype), dweight

    def body(carry, index):
        scores, dhidden, dweight = carry
        start = chunks.start(index)
        rows = [lax.dynamic_slice_in_dim(x, start, chunks.size) for x in (hidden, labels, weights)]
        rows[2] = jnp.where(chunks.fresh(index, rows[2].shape), rows[2], 0.0)
        new_scores, new_dhidden, new_dweight = gradients(*rows)
        scores = jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new, start, 0), scores, new_scores
        )
        new_dhidden += lax.dynamic_slice_in_dim(dhidden, start, chunks.size)
        dhidden = lax.dynamic_update_slice_in_dim(dhidden, new_dhidden, start, 0)
        return (scores, dhidden, dweight + new_dweight), None

    if chunks.count == 1:
        scores, dhidden, dweight = gradients(hidden, labels, weights)
    else:
        dweight = jnp.zeros(weight.shape, jnp.float32)
        carry = (_empty_scores(labels), jnp.zeros_like(hidden), dweight)
        (scores, dhidden, dweight), _ = lax.scan(body, carry, jnp.arange(chunks.count))
    return _reduce(scores, weights, options), (dhidden, dweight.astype(weight.dtype))


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
        highest, total, label_logit = carry
        logits, _ = _vocabulary_slice(hidden, weight, chunks, index, options)
        fresh = chunks.fresh(index, logits.shape)
        new_highest = jnp.maximum(highest, jnp.max(logits, axis=-1))  # repeats do no harm here
        exponentials = jnp.where(fresh, jnp.exp(logits - new_highest[..., None]), 0.0)
        total = total * jnp.exp(highest - new_highest) + jnp.sum(exponentials, axis=-1)
        place = labels - chunks.start(index)
        inside = (place >= 0) & (place < chunks.size)
        label_logit = jnp.where(inside, _pick(logits, place), label_logit)
        return (new_highest, total, label_logit), None

    zeros = jnp.zeros(labels.shape)
    carry = (jnp.full(labels.shape, -jnp.inf), zeros, zeros)
    (highest, total, label_logit), _ = lax.scan(body, carry, jnp.arange(chunks.count))
    scores = Scores(label_logit, highest + jnp.log(total), label_logit >= highest)
    residuals = (hidden, weight, labels, weights, scores.lse)
    return _reduce(scores, weights, options), residuals


def _by_vocabulary_backward(options, residuals, cotangents):
    hidden, weight, labels, weights, lse = residuals
    weights = weights * cotangents[0]
    scale = _z_scale(lse, weights, options)
    chunks = _vocabulary_chunks(hidden, weight, options)

    def body(carry, index):
        dhidden, dweight = carry
        logits, rows = _vocabulary_slice(hidden, weight, chunks, index, options)
        start = chunks.start(index)
        probabilities = jnp.exp(logits - lse[..., None]) * scale[..., None]
        dlogits = _dlogits(logits, probabilities, labels - start, weights, options)
        dlogits = jnp.where(chunks.fresh(index, dlogits.shape), dlogits, 0.0).astype(hidden.dtype)
        dhidden += jnp.einsum("rv,vd->rd", dlogits, rows, preferred_element_type=jnp.float32)
        new = jnp.einsum("rv,rd->vd", dlogits, hidden, preferred_element_type=jnp.float32)
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
        return _scores(_logits(hidden, compute_weight, options), labels)[0]

    def body(scores, index):
        start = chunks.start(index)
        new = score(*(lax.dynamic_slice_in_dim(x, start, chunks.size) for x in (hidden, labels)))
        return jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new, start, 0), scores, new
        ), None

    if chunks.count == 1:
        return score(hidden, labels)
    return lax.scan(body, _empty_scores(labels), jnp.arange(chunks.count))[0]


def _row_chunks(hidden, weight, options) -> Chunks:
    return Chunks.cover(len(hidden), options.chunk_logits // len(weight))


def _vocabulary_chunks(hidden, weight, options) -> Chunks:
    return Chunks.cover(len(weight), options.chunk_logits // len(hidden))


def _vocabulary_slice(hidden, weight, chunks, index, options):
    """Logits and weight rows of one slice of the vocabulary."""
    rows = lax.dynamic_slice_in_dim(weight, chunks.start(index), chunks.size, 0)
    rows = rows.astype(hidden.dtype)
    return _logits(hidden, rows, options), rows


def _logits(hidden, weight, options) -> Float[Array, "R V"]:
    """Float32 logits, soft-capped."""
    logits = jnp.einsum("rd,vd->rv", hidden, weight, preferred_element_type=jnp.float32)
    if options.soft_cap is not None:
        logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
    return logits


def _pick(logits, labels) -> Float[Array, "R"]:
    """The label's logit; some finite value where the label is out of range."""
    return jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]


def _scores(logits, labels):
    """Scores, exp(logits - highest) and its sum."""
    if compat.target().platform == "gpu":
        highest, total = _highest_and_total(logits)
        exponentials = jnp.exp(logits - highest[..., None])
    else:
        highest = jnp.max(logits, axis=-1)
        exponentials = jnp.exp(logits - highest[..., None])
        total = jnp.sum(exponentials, axis=-1)
    label_logit = _pick(logits, labels)
    scores = Scores(label_logit, highest + jnp.log(total), label_logit >= highest)
    return scores, exponentials, total


def _highest_and_total(logits):
    """max and sum(exp(logits - max)) over the last axis, from one reading (arXiv:1805.02867).

    Worth it where memory is slower than twice the exponentials: 1% of a GPT-2 step on an H200.
    """

    def merge(left, right):
        highest = jnp.maximum(left[0], right[0])
        scaled = [total * jnp.exp(own - highest) for own, total in (left, right)]
        return highest, scaled[0] + scaled[1]

    # Finite, because the difference of two infinities is not a number.
    start = (jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0.0))
    return lax.reduce((logits, jnp.ones_like(logits)), start, merge, (logits.ndim - 1,))


def _z_scale(lse, weights, options):
    """Factor of the probabilities in the gradient: d(lse + z lse^2) / d lse, weighted."""
    return weights * (1.0 + 2.0 * options.z_loss * lse)


def _dlogits(logits, scaled_probabilities, labels, weights, options):
    """Gradient of the total in the logits before the soft-cap, float32."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    dlogits = scaled_probabilities - jnp.where(is_label, weights[..., None], 0.0)
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
