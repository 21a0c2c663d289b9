"""Feature maps phi(q), phi(k) whose product is the weight that linear attention gives a token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from efficient_lm.mixers.recurrent import kept_inputs


def elu(x: Float[Array, "B T N K"]) -> Float[Array, "B T N K"]:
    """elu(x) + 1, which is above 0 (arXiv 2006.16236, eq. 7)."""
    one, zero = jnp.ones((), x.dtype), jnp.zeros((), x.dtype)
    # exp(x), not (exp(x) - 1) + 1: bf16 would lose all of it for x below -6.
    return jnp.where(x > zero, x + one, jnp.exp(jnp.where(x > zero, zero, x)))


def squared_relu(x: Float[Array, "B T N K"]) -> Float[Array, "B T N K"]:
    """max(x, 0)^2."""
    return jnp.square(jax.nn.relu(x))


@kept_inputs
def hedgehog(
    x: Float[Array, "B T N K"], matrix: Float[Array, "N K K"]
) -> Float[Array, "B T N 2*K"]:
    """softmax([Ax, -Ax]) of each head (arXiv 2402.04347)."""
    y = jnp.einsum("btnk,nkf->btnf", x, matrix.astype(x.dtype)).astype(jnp.float32)
    return jax.nn.softmax(jnp.concatenate([y, -y], axis=-1), axis=-1).astype(x.dtype)


@functools.lru_cache(maxsize=8)
def random_directions(features: int, key_dim: int, seed: int) -> np.ndarray:
    """[features, key_dim] fp32: Gaussian rows, orthogonal within each `key_dim` of them."""
    rng = np.random.default_rng(seed)

    def block():
        # With the signs of R taken out, else the first entries of the directions are negative.
        q, r = np.linalg.qr(rng.standard_normal((key_dim, key_dim)))
        return (q * np.sign(np.diag(r))[None]).T

    blocks = [block() for _ in range(-(-features // key_dim))]
    lengths = np.linalg.norm(rng.standard_normal((features, key_dim)), axis=1)
    return (np.concatenate(blocks)[:features] * lengths[:, None]).astype(np.float32)


def performer(
    query: Float[Array, "B T N K"],
    key: Float[Array, "B T N K"],
    directions: Float[np.ndarray, "F K"],
    segment_ids: Int[Array, "B T"] | None = None,
    largest: Float[Array, "B N"] | None = None,
    segment: Int[Array, "B"] | None = None,
) -> tuple[
    Float[Array, "B T N F"], Float[Array, "B T N F"], Float[Array, "B T N"], Float[Array, "B N"]
]:
    """(phi(q), phi(k), log decay, largest): phi(q).phi(k) estimates exp(q.k / sqrt(K)).

    FAVOR+ (arXiv 2009.14794, lemma 1): phi(x) = exp(w.x' - |x'|^2 / 2) with x' = x K^(-1/4), for
    rows w of `directions`. Exponents are kept at or below 0 by factors that cancel in a weighted
    mean: that of a query is of its token; that of keys is of the largest exponent so far in their
    document, so that no later token is looked at, and what was written before must decay when it
    grows. `largest` and `segment` are those of the tokens before these.
    """

    def exponents(x):
        x = x.astype(jnp.float32) * x.shape[-1] ** -0.25
        dots = jnp.einsum("btnk,fk->btnf", x, directions, precision="highest")
        return dots - 0.5 * jnp.sum(x * x, axis=-1, keepdims=True)

    @kept_inputs
    def features(x, largest):
        return jnp.exp(exponents(x) - largest[..., None]).astype(x.dtype)

    def largest_of(x):
        return jax.lax.stop_gradient(jnp.max(exponents(x), axis=-1))

    rows, _, heads, _ = key.shape
    if segment_ids is None:
        segment_ids = jnp.ones(key.shape[:2], jnp.int32)
    if largest is None or segment is None:
        largest = jnp.full((rows, heads), -jnp.inf, jnp.float32)
        segment = jnp.zeros((rows,), jnp.int32)
    own = largest_of(key)  # [B, T, N]
    seen = jax.lax.cummax(jnp.concatenate([segment[:, None], segment_ids], axis=1), axis=1)
    starts = (segment_ids > seen[:, :-1])[:, :, None]
    real = jnp.where((segment_ids > 0)[:, :, None], own, -jnp.inf)
    real = jnp.concatenate([largest[:, None], real], axis=1)
    resets = jnp.pad(jnp.broadcast_to(starts, own.shape), ((0, 0), (1, 0), (0, 0)))
    _, running = jax.lax.associative_scan(
        lambda a, b: (a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))),
        (resets, real),
        axis=1,
    )
    before, now = running[:, :-1], running[:, 1:]
    log_decay = jnp.where(starts | (before == -jnp.inf), 0.0, before - now)
    # Padding has nothing to keep its own exponents below.
    return (
        features(query, largest_of(query)),
        features(key, jnp.maximum(now, own)),
        log_decay,
        running[:, -1],
    )
