"""Short causal convolution of each feature over time, within packed documents."""

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

    def weighted_sum(taps, weight, bias):
        wide = weight.astype(jnp.float32)
        y = sum(
            tap.astype(jnp.float32) * wide[None, None, :, :, width - 1 - i]
            for i, tap in enumerate(taps)
        )
        if bias is not None:
            y = y + bias.astype(jnp.float32)[None, None]
        return (y if activation is None else activation(y)).astype(x.dtype)

    # Else the products, in fp32 and shifted, would be kept for the backward pass.
    @jax.checkpoint
    def parallel(x, weight, bias):
        return weighted_sum(_slots_before(x, segment_ids, width), weight, bias)

    if state is None or width == 1:  # which needs no token before
        return parallel(x, weight, bias), state
    taps, state = _tokens_before(x, segment_ids, state, width)
    return parallel(x, weight, bias) if fresh else weighted_sum(taps, weight, bias), state


def _slots_before(x, segment_ids, width):
    """[x_t, x_(t-1), ...] for each slot of a row; zeros before its start and of other documents."""

    def shifted(y, i):
        padding = [(i, -i, 0) if axis == 1 else (0, 0, 0) for axis in range(y.ndim)]
        return jax.lax.pad(y, jnp.zeros((), y.dtype), padding)

    taps = [x]
    for i in range(1, width):
        tap = shifted(x, i)
        if segment_ids is not None:
            same = segment_ids == shifted(segment_ids, i)
            tap = jnp.where(same[:, :, None, None], tap, jnp.zeros((), x.dtype))
        taps.append(tap)
    return taps


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
