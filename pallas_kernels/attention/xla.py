"""Attention in plain XLA with memory linear in the sequence, on any device.

Short sequences go in a few panels of queries, each against the keys it may see; long ones in tiles
with an online softmax (Milakov & Gimelshein 2018; Dao et al. 2022, algorithms 1 and 4).
"""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels._core import compat, tuning
from pallas_kernels.attention import schedule, tile, xla_panels, xla_tiles
from pallas_kernels.attention.mask import Mask

PANEL_BYTES = 2**24  # of fp32 scores, up to which all of them may be alive at once
ROWS = 1024  # of tiles at most
SHORT = 16  # queries, up to which their scores are linear in memory anyway


@dataclass(frozen=True)
class Options:
    """What is static: `chunks` are (queries, keys) a tile; keys None means panels."""

    scale: float
    soft_cap: float | None
    chunks: tuple[int, int | None]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    return_log_sum_exp: bool = False,
    chunks: tuple[int, int | None] | None = None,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`ref.attention` with fp32 softmax and accumulation; the products take the inputs' dtype.

    chunks: queries and keys a tile; keys None: panels of queries. None: tuned, else by the sizes.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    if chunks is None:
        shape = {"B": B, "T": T, "S": k.shape[1], "N": N, "K": K, "H": H}
        tuned = tuning.lookup("attention", "xla", compat.target().kind, shape)
        chunks = tuple(tuned["chunks"]) if tuned else choose_chunks(mask, B * N, T, k.shape[1])
    grouped = None if sinks is None else sinks.astype(jnp.float32).reshape(1, K, N // K, 1)
    options = Options(float(scale), soft_cap, chunks)
    out, lse = _attend(options, q.reshape(B, T, K, N // K, H), k, v, grouped, mask)
    out = out.reshape(B, T, N, H)
    if not return_log_sum_exp:
        return out
    lse = jnp.where(lse == jnp.inf, -jnp.inf, lse)  # a backward pass wants exp(score - lse) = 0
    return out, jnp.moveaxis(lse, 3, 1).reshape(B, T, N)


def gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    log_sum_exp: Float[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    *,
    mask: Mask,
    scale: float,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """`ref.gradients`, in tiles."""
    B, T, N, H = q.shape
    K = k.shape[2]
    options = Options(float(scale), soft_cap, tile_sizes(T, k.shape[1]))
    q, out, d_out = (array.reshape(B, T, K, N // K, H) for array in (q, out, d_out))
    lse = jnp.where(log_sum_exp == -jnp.inf, jnp.inf, log_sum_exp).reshape(B, T, K, N // K)
    delta = tile.delta(out, d_out)
    dq, dk, dv, _ = xla_tiles.backward(
        options, q, k, v, None, mask, jnp.moveaxis(lse, 1, 3), delta, d_out
    )
    return dq.reshape(B, T, N, H), dk, dv


def choose_chunks(mask: Mask, heads: int, T: int, S: int) -> tuple[int, int | None]:
    """Panels while all scores fit in PANEL_BYTES or queries are few, else square tiles."""
    if T > SHORT and 4 * heads * T * S > PANEL_BYTES:
        return tile_sizes(T, S)
    size = max(32, math.ceil(T / 4))  # smaller panels cost more than the scores that they skip
    tiles = math.ceil(T / size) * math.ceil(S / size)
    skips = len(schedule.visits(mask, T, S, size, size)) < tiles
    return (size if skips else T), None


def tile_sizes(T: int, S: int) -> tuple[int, int]:
    """Queries and keys a tile; larger ones for millions of tokens, as all tiles are listed."""
    chunk = 512 if T >= 4096 else 256
    while ROWS * chunk < T:
        chunk *= 2
    return min(chunk, T), min(chunk, S)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, sinks, mask):
    """Output [B, T, K, G, H] and log-sum-exp [B, K, G, T], +inf where no key was allowed.

    q [B, T, K, G, H], k and v [B, S, K, H], sinks [1, K, G, 1] or None.
    """
    return _forward(options, q, k, v, sinks, mask)[0]


def _forward(options, q, k, v, sinks, mask):
    form = xla_panels if options.chunks[1] is None else xla_tiles
    out, saved = checkpoint_name(form.forward(options, q, k, v, sinks, mask), "attention")
    return (out, form.log_sum_exp(saved)), (q, k, v, sinks, mask, saved, out)


def _backward(options, residuals, cotangents):
    *inputs, saved, out = residuals
    q, k, v, *_ = inputs
    d_out, d_lse = cotangents
    form = xla_panels if options.chunks[1] is None else xla_tiles
    delta = tile.delta(out, d_out, d_lse)
    dq, dk, dv, d_sinks = form.backward(options, *inputs, saved, delta, d_out)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_sinks, None


_attend.defvjp(_forward, _backward)
