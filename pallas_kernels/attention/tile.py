"""The mathematics of one tile of attention, forward and backward, in plain jnp."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

LOWEST = -1e30  # a maximum over no key: finite, so that differences of maxima are no NaN


class Layout(NamedTuple):
    """Einsum axes of query-like and key-like arrays."""

    q: str
    k: str


STORED = Layout("bkgth", "bskh")  # keys as given: a cache is read without a copy of it
STACKED = Layout("bkgth", "bksh")  # one tile of the chunked form


class State(NamedTuple):
    """An online softmax over the keys seen so far, all fp32."""

    maximum: Float[Array, "b k g t"]
    total: Float[Array, "b k g t"]
    values: Float[Array, "b k g t h"]


def start(rows: tuple[int, int, int, int], H: int) -> State:
    """The state over no key, for rows (b, k, g, t)."""
    zeros = jnp.zeros(rows, jnp.float32)
    return State(zeros + LOWEST, zeros, jnp.zeros((*rows, H), jnp.float32))


def softmax(q, k, v, fits: Bool[Array, "b 1 1 t s"] | None, sinks, options, layout):
    """All keys of some rows at once: output in `layout`, log-sum-exp and normalized weights."""
    scores = _masked(_scores(q, k, options, layout), fits)
    maximum = jnp.maximum(scores.max(axis=-1), LOWEST)
    if sinks is not None:
        maximum = jnp.maximum(maximum, sinks)
    weights = jnp.exp(scores - maximum[..., None])
    total = weights.sum(axis=-1)
    if sinks is not None:
        total = total + jnp.exp(sinks - maximum)
    weights, lse = _normalize(weights, maximum, total)
    weights = weights.astype(v.dtype)
    out = jnp.einsum(
        f"bkgts,{layout.k}->{layout.q}", weights, v, preferred_element_type=jnp.float32
    )
    return out, lse, weights


def step(state: State, q, k, v, fits, options, layout) -> State:
    """Take the keys of one more tile into the state."""
    scores = _masked(_scores(q, k, options, layout), fits)
    maximum = jnp.maximum(state.maximum, scores.max(axis=-1))
    weights = jnp.exp(scores - maximum[..., None])
    decay = jnp.exp(state.maximum - maximum)
    total = state.total * decay + weights.sum(axis=-1)
    return State(maximum, total, state.values * decay[..., None] + _weighted(weights, v, layout))


def finish(state: State, sinks: Float[Array, "1 k g 1"] | None):
    """Output [b, k, g, t, h] and log-sum-exp [b, k, g, t]; 0 and +inf where no key was allowed."""
    maximum, total, values = state
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks, maximum.shape)
        maximum = jnp.maximum(state.maximum, sinks)
        decay = jnp.exp(state.maximum - maximum)
        total = total * decay + jnp.exp(sinks - maximum)
        values = values * decay[..., None]
    return _normalize(values, maximum, total)


def _normalize(array, maximum, total):
    """`array` over its row's total, and the log-sum-exp of the row."""
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    return array / total[..., None], jnp.where(empty, jnp.inf, maximum + jnp.log(total))


def normalized(q, k, lse, fits, options, layout):
    """Softmax weights [b, k, g, t, s] recomputed from lse [b, k, g, t], and the capped logits."""
    scores = _scores(q, k, options, layout)
    weights = jnp.exp(scores - lse[..., None])
    return weights if fits is None else jnp.where(fits, weights, 0.0), scores


def gradients(q, k, v, d_out, weights, scores, delta, options, layout):
    """fp32 contributions of one tile to dq, dk and dv.

    weights: from `normalized`. scores: too, read only with a soft-cap. delta: from `delta`.
    """
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dv = einsum(f"bkgts,{layout.q}->{layout.k}", weights.astype(v.dtype), d_out)
    d_weights = einsum(f"{layout.q},{layout.k}->bkgts", d_out, v)
    d_scores = weights.astype(jnp.float32) * (d_weights - delta[..., None])
    if options.soft_cap is not None:
        d_scores = d_scores * (1.0 - jnp.square(scores / options.soft_cap))
    d_scores = (d_scores * options.scale).astype(q.dtype)
    dq = einsum(f"bkgts,{layout.k}->{layout.q}", d_scores, k)
    dk = einsum(f"bkgts,{layout.q}->{layout.k}", d_scores, q)
    return dq, dk, dv


def merge(
    a: tuple[Float[Array, "*rows H"], Float[Array, "*rows"]],
    b: tuple[Float[Array, "*rows H"], Float[Array, "*rows"]],
) -> tuple[Float[Array, "*rows H"], Float[Array, "*rows"]]:
    """Output and log-sum-exp over all keys from those over two parts of them, fp32.

    A log-sum-exp of -inf is that of no key.
    """
    lse = jnp.logaddexp(a[1], b[1])
    finite = jnp.where(lse == -jnp.inf, 0.0, lse)
    out = sum(jnp.exp(part - finite)[..., None] * out.astype(jnp.float32) for out, part in (a, b))
    return out, lse


def delta(out, d_out, d_lse=None):
    """What a row's d_weights are measured against, fp32 [b, k, g, t].

    sum(out * d_out) over features of [b, t, k, g, h], less d_lse [b, k, g, t] where the
    log-sum-exp is an output too: its derivative by the scores are the weights.
    """
    product = out.astype(jnp.float32) * d_out.astype(jnp.float32)
    total = jnp.moveaxis(product.sum(axis=-1), 1, 3)
    return total if d_lse is None else total - d_lse


def sink_gradient(sinks, lse, delta):
    """Gradient [1, k, g, 1] of the sinks: their weight takes from every value of the row."""
    if sinks is None:
        return None
    return -(jnp.exp(sinks - lse) * delta).sum(axis=(0, 3), keepdims=True)


def _scores(q, k, options, layout):
    """Capped logits [b, k, g, t, s] in fp32, before masking."""
    scores = jnp.einsum(f"{layout.q},{layout.k}->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = scores * options.scale
    if options.soft_cap is not None:
        scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
    return scores


def _masked(scores, fits):
    return scores if fits is None else jnp.where(fits, scores, -jnp.inf)


def _weighted(weights, v, layout):
    """Sum of values [b, k, g, t, h] in fp32; the product takes the dtype of the values."""
    weights = weights.astype(v.dtype)
    return jnp.einsum(f"bkgts,{layout.k}->bkgth", weights, v, preferred_element_type=jnp.float32)
