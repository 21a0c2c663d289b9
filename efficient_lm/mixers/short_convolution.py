"""Short causal convolution of each feature over time, within packed documents."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from efficient_lm.model.parameter import parameter


def convolution_weight(rngs: nnx.Rngs, sizes: dict[str, int], width: int) -> nnx.Param:
    """A weight [*sizes, width], uniform in +-1/sqrt(width) as PyTorch draws it; no weight decay."""
    limit = width**-0.5
    shape = (*sizes.values(), width)
    value = jax.random.uniform(rngs.params(), shape, jnp.float32, -limit, limit)
    return parameter(value, (*sizes, "width"))


def init_state(batch: int, sizes: tuple[int, ...], width: int, dtype) -> dict[str, Array]:
    """No tokens yet: the last width - 1 real inputs [B, width - 1, *sizes] and their segments."""
    return {
        "inputs": jnp.zeros((batch, width - 1, *sizes), dtype),
        "segments": jnp.zeros((batch, width - 1), jnp.int32),
    }


def short_convolution(
    x: Float[Array, "B T N H"],
    weight: Float[Array, "N H W"],
    *,
    bias: Float[Array, "N H"] | None = None,
    activation: Callable[[Array], Array] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    state: dict[str, Array] | None = None,
    fresh: bool = False,
) -> tuple[Float[Array, "B T N H"], dict[str, Array] | None]:
    """activation(bias + sum_i weight[..., W - 1 - i] x_(t - i)), and the new state if one is given.

    Tokens of other documents count as zeros. Padding (segment 0) is skipped: a token sees the W - 1
    real ones before it. Without a state, or with a `fresh` (empty) one, it sees slots of the row
    instead, so that padding may stand around documents there, but not inside of one.
    weight: its last tap is of the token itself, as in PyTorch. The sum is in fp32.
    state: from `init_state` or an earlier call; the tokens follow those that it has seen.
    """
    width = weight.shape[-1]
    if state is None or width == 1:  # which needs no token before
        return _parallel(x, weight, bias, segment_ids, activation), state
    taps, state = _tokens_before(x, segment_ids, state, width)
    if fresh:
        return _parallel(x, weight, bias, segment_ids, activation), state
    y = _weighted_sum(taps, weight, bias)
    return (y if activation is None else activation(y)).astype(x.dtype), state


def _weighted_sum(taps, weight, bias):
    """bias + sum_i weight[..., W - 1 - i] taps[i], in fp32."""
    y = sum(
        tap.astype(jnp.float32) * tap_weight
        for tap, tap_weight in zip(taps, _by_tap(weight), strict=True)
    )
    return y if bias is None else y + bias.astype(jnp.float32)[None, None]


def _by_tap(weight):
    """Weights [1, 1, N, H] in fp32: of the token, of the one before it, ..."""
    wide = weight.astype(jnp.float32)[None, None]
    return [wide[..., i] for i in reversed(range(weight.shape[-1]))]


def _shifted(x, segment_ids, slots: int):
    """x of `slots` slots before (after, where negative); zeros for none and for other documents."""

    def shift(y):
        padding = [(slots, -slots, 0) if axis == 1 else (0, 0, 0) for axis in range(y.ndim)]
        return jax.lax.pad(y, jnp.zeros((), y.dtype), padding)

    if slots == 0:
        return x
    if segment_ids is None:
        return shift(x)
    same = segment_ids == shift(segment_ids)
    return jnp.where(same[:, :, None, None], shift(x), jnp.zeros((), x.dtype))


# Differentiated as it stands, it would keep each shifted product in fp32, and hand their gradients
# on one by one. So the inputs alone are kept, and what passes between the two passes over them is
# the gradient of the sum, in the type of x.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _parallel(x, weight, bias, segment_ids, activation):
    """All tokens at once, each of which sees slots of the row."""
    taps = [_shifted(x, segment_ids, i) for i in range(weight.shape[-1])]
    y = _weighted_sum(taps, weight, bias)
    return (y if activation is None else activation(y)).astype(x.dtype)


def _parallel_forward(x, weight, bias, segment_ids, activation):
    return _parallel(x, weight, bias, segment_ids, activation), (x, weight, bias, segment_ids)


def _parallel_backward(activation, inputs, gradient):
    x, weight, bias, segment_ids = inputs
    taps = [_shifted(x, segment_ids, i) for i in range(weight.shape[-1])]
    gradient = gradient.astype(jnp.float32)
    if activation is not None:
        _, pull = jax.vjp(activation, _weighted_sum(taps, weight, bias))
        (gradient,) = pull(gradient)
    d_weight = [jnp.sum(gradient * tap.astype(jnp.float32), axis=(0, 1)) for tap in reversed(taps)]
    d_bias = None if bias is None else jnp.sum(gradient, axis=(0, 1)).astype(bias.dtype)
    gradient = gradient.astype(x.dtype)
    after = [_shifted(gradient, segment_ids, -i) for i in range(weight.shape[-1])]
    d_x = _weighted_sum(after, weight, None).astype(x.dtype)
    return d_x, jnp.stack(d_weight, axis=-1).astype(weight.dtype), d_bias, None


_parallel.defvjp(_parallel_forward, _parallel_backward)


def _tokens_before(x, segment_ids, state, width):
    """([x_t, the real token before it, ...], new state); zeros for those of other documents."""
    length = x.shape[1]
    x = jnp.concatenate([state["inputs"].astype(x.dtype), x], axis=1)
    if segment_ids is None:
        segment_ids = jnp.ones((len(x), length), jnp.int32)
    segments = jnp.concatenate([state["segments"], segment_ids], axis=1)
    if length == 1:  # a decode step, which needs no search
        taps = [x[:, width - 1 :]]
        for i in range(width - 2, -1, -1):
            same = (segments[:, i : i + 1] == segment_ids)[:, :, None, None]
            taps.append(jnp.where(same, x[:, i : i + 1], jnp.zeros((), x.dtype)))
        real = segment_ids > 0
        inputs = jnp.where(real[:, :, None, None], x[:, 1:], x[:, :-1])
        return taps, {
            "inputs": inputs.astype(state["inputs"].dtype),
            "segments": jnp.where(real, segments[:, 1:], segments[:, :-1]),
        }
    # The state's slots count as real, so that all new tokens have width - 1 of them before.
    place = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    real = (segments > 0) | (place < width - 1)
    last = jax.lax.cummax(jnp.where(real, place, 0), axis=1)
    before = jnp.pad(last, ((0, 0), (1, 0)))  # one more: that before the next token to come
    found = jnp.broadcast_to(jnp.arange(x.shape[1] + 1, dtype=jnp.int32)[None], before.shape)
    taps, inputs, their_segments = [x[:, width - 1 :]], [], []
    for _ in range(1, width):
        found = jnp.take_along_axis(before, found, axis=1)
        tap = jnp.take_along_axis(x, found[:, width - 1 :, None, None], axis=1)
        segment = jnp.take_along_axis(segments, found[:, width - 1 :], axis=1)
        same = (segment[:, :-1] == segment_ids)[:, :, None, None]
        taps.append(jnp.where(same, tap[:, :-1], jnp.zeros((), x.dtype)))
        inputs.append(tap[:, -1:])
        their_segments.append(segment[:, -1:])
    return taps, {
        "inputs": jnp.concatenate(inputs[::-1], axis=1).astype(state["inputs"].dtype),
        "segments": jnp.concatenate(their_segments[::-1], axis=1),
    }
