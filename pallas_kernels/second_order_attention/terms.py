"""What the forms of second-order attention share: features of degree two, and common terms."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels._core.recurrence import Documents, over_heads

SMALLEST_SUM = 1e-12  # of the weights of a row, in every form: 1 / SMALLEST_SUM^2 fits in fp32
SMALLEST_LOG_DECAY = -100.0  # exp of it is 0 in fp32; sums of such numbers stay finite
COARSE = 2.0**-9  # in fp32, sums of up to 327 multiples of it >= SMALLEST_LOG_DECAY are exact


def feature_count(size: int) -> int:
    """Monomials of degree two in `size` variables."""
    return size * (size + 1) // 2


def pairs(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a [P], b [P], weight [P]) of the monomials x_a x_b with a <= b; weight sqrt(2) if a < b."""
    first, second = np.triu_indices(size)
    return first, second, np.where(first == second, 1.0, 2.0**0.5)


def wide_type(x: Float[Array, "..."]):
    """fp32, or fp64 for fp64."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


@jax.custom_vjp
def features(x: Float[Array, "*tokens K"]) -> Float[Array, "*tokens P"]:
    """phi with phi(x) . phi(y) = (x . y)^2, of the P = K (K + 1) / 2 monomials of degree two."""
    first, second, weight = pairs(x.shape[-1])
    weight = jnp.asarray(weight, x.dtype).reshape(*[1] * (x.ndim - 1), -1)
    return jnp.take(x, first, axis=-1) * jnp.take(x, second, axis=-1) * weight


def _forward(x):
    return features(x), x


def _backward(x, gradient):
    """A product with a symmetric matrix; that of `take` would be a scatter, which is slow."""
    size = x.shape[-1]
    first, second, weight = pairs(size)
    place, factor = np.zeros((size, size), np.int32), np.zeros((size, size))
    for a, b in ((first, second), (second, first)):
        place[a, b] = np.arange(len(first))
        factor[a, b] = weight
    factor += np.diag(np.diag(factor))  # the derivative of x_a^2
    matrix = jnp.take(gradient, place, axis=-1)
    matrix = matrix * jnp.asarray(factor, x.dtype).reshape(*[1] * (x.ndim - 1), size, size)
    return (jnp.einsum("...ab,...b->...a", matrix, x, precision="highest"),)


features.defvjp(_forward, _backward)


class Terms(NamedTuple):
    """Arguments with one head each and without padding. index: document of each token, from 0."""

    q: Float[Array, "B N T K"]
    k: Float[Array, "B N T K"]
    v: Float[Array, "B N T V"]
    g: Float[Array, "B N T"]
    index: Int[Array, "B T"]


def make_terms(q, k, v, g, documents: Documents | None) -> Terms:
    """Heads before tokens, g in fp32 or wider; k and g of padding are 0, so it adds nothing."""
    heads = v.shape[2]
    wide = wide_type(v)
    if g is None:
        g = jnp.zeros_like(v, wide, v.shape[:3])
    g = jnp.maximum(g.astype(wide), SMALLEST_LOG_DECAY)
    index = jnp.zeros_like(q, jnp.int32, q.shape[:2])
    if documents is not None:
        index, real = documents
        k = jnp.where(real[:, :, None, None], k, jnp.zeros((), k.dtype))
        g = jnp.where(real[:, :, None], g, 0.0)
    q, k = over_heads(q, heads), over_heads(k, heads)
    return Terms(*(jnp.moveaxis(x, 1, 2) for x in (q, k, v, g)), index)


def in_two(g: Float[Array, "*tokens"]) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
    """(multiples of COARSE, the small rest) with sum g, whose sums over a chunk keep their digits.

    Differences of sums of g itself lose those of small decays that stand beside large ones.
    """
    coarse = jax.lax.stop_gradient(COARSE * jnp.round(g / COARSE))
    return coarse, g - coarse


def with_ones(v: Float[Array, "*tokens V"], multiple: int = 1) -> Float[Array, "*tokens V1"]:
    """Values, a column of ones, whose weighted sum is the sum of the weights, and zeros.

    The number of columns is a multiple of `multiple`: matrix units read rows of 8 numbers.
    """
    zeros = jnp.zeros((*v.shape[:-1], -(v.shape[-1] + 1) % multiple), v.dtype)
    return jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1), v.dtype), zeros], axis=-1)


def normalized(sums: Float[Array, "*tokens V1"], size: int) -> Float[Array, "*tokens V"]:
    """Weighted sums of `size` values over the sum of the weights, at least SMALLEST_SUM."""
    return sums[..., :size] / jnp.maximum(sums[..., size : size + 1], SMALLEST_SUM)
