"""The short causal convolution of a mixer: its weight, its decode state, and steps of both."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import pallas_kernels
from efficient_lm.model.parameter import parameter
from pallas_kernels.short_convolution.xla import of_norm_one, weighted_sum


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
    silu: bool = False,
    unit_norm: bool = False,
    segment_ids: Int[Array, "B T"] | None = None,
    state: dict[str, Array] | None = None,
    fresh: bool = False,
) -> tuple[Float[Array, "B T N H"], dict[str, Array] | None]:
    """`pallas_kernels.short_convolution` of these tokens, and the new state if one is given.

    Tokens of other documents count as zeros. Padding (segment 0) is skipped: a token sees the W - 1
    real ones before it. Without a state, or with a `fresh` (empty) one, it sees slots of the row
    instead, so that padding may stand around documents there, but not inside of one.
    state: from `init_state` or an earlier call; the tokens follow those that it has seen.
    """
    width = weight.shape[-1]
    if state is not None and width > 1:  # which needs tokens before
        taps, state = _tokens_before(x, segment_ids, state, width)
        if not fresh:
            y = weighted_sum(taps, weight, bias)
            y = (jax.nn.silu(y) if silu else y).astype(x.dtype)
            return of_norm_one(y) if unit_norm else y, state
    y = pallas_kernels.short_convolution(
        x, weight, bias, silu=silu, unit_norm=unit_norm, segment_ids=segment_ids
    )
    return y, state


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
