"""Short convolution by shifted sums on any backend.

Differentiated as it stands, it would keep each shifted product in fp32, and hand their gradients on
one by one. So the inputs alone are kept, and what passes between the two passes over them is the
gradient of the sum, in the type of x.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.short_convolution.ref import EPSILON


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(4, 5))
def _normed(x, weight, bias, segment_ids, silu, unit_norm):
    y = convolved(x, weight, bias, segment_ids, silu)
    return of_norm_one(y) if unit_norm else y


def short_convolution(
    x: Float[Array, "B T N H"],
    weight: Float[Array, "N H W"],
    bias: Float[Array, "N H"] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    silu: bool,
    unit_norm: bool,
) -> Float[Array, "B T N H"]:
    """As `ref.short_convolution`; sums in fp32, the result of each step in the type of x."""
    return _normed(x, weight, bias, segment_ids, silu, unit_norm)


def of_norm_one(y: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """y / sqrt(|y|^2 + 1e-6) for each head, in fp32; finite gradients where y is zero."""
    wide = y.astype(jnp.float32)
    square = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(square + EPSILON)).astype(y.dtype)


def weighted_sum(taps, weight, bias):
    """bias + sum_i weight[..., W - 1 - i] taps[i], in fp32."""
    wide = weight.astype(jnp.float32)[None, None]
    y = sum(tap.astype(jnp.float32) * wide[..., -1 - i] for i, tap in enumerate(taps))
    return y if bias is None else y + bias.astype(jnp.float32)[None, None]


def shifted(x, segment_ids, slots: int):
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def convolved(x, weight, bias, segment_ids, silu):
    """All tokens at once, each of which sees slots of the row."""
    y = weighted_sum(_taps(x, weight, segment_ids), weight, bias)
    return (jax.nn.silu(y) if silu else y).astype(x.dtype)


def _taps(x, weight, segment_ids, sign=1):
    return [shifted(x, segment_ids, sign * i) for i in range(weight.shape[-1])]


def _forward(x, weight, bias, segment_ids, silu):
    return convolved(x, weight, bias, segment_ids, silu), (x, weight, bias, segment_ids)


def _backward(silu, inputs, gradient):
    x, weight, bias, segment_ids = inputs
    taps = _taps(x, weight, segment_ids)
    gradient = gradient.astype(jnp.float32)
    if silu:
        _, pull = jax.vjp(jax.nn.silu, weighted_sum(taps, weight, bias))
        (gradient,) = pull(gradient)
    d_weight = [jnp.sum(gradient * tap.astype(jnp.float32), axis=(0, 1)) for tap in reversed(taps)]
    d_bias = None if bias is None else jnp.sum(gradient, axis=(0, 1)).astype(bias.dtype)
    after = _taps(gradient.astype(x.dtype), weight, segment_ids, sign=-1)
    d_x = weighted_sum(after, weight, None).astype(x.dtype)
    return d_x, jnp.stack(d_weight, axis=-1).astype(weight.dtype), d_bias, None


convolved.defvjp(_forward, _backward)
