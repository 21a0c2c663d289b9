"""Attention by JAX's TPU splash kernel."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._core import compat
from pallas_kernels.attention.mask import Mask, Term

LANES = 128  # of a TPU vector register; lengths are padded to multiples
BLOCKS = (512, 384, 256, 128)  # tokens, the larger the better as far as VMEM goes


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`ref.attention` on a TPU, within what `support.TABLE` declares.

    interpret: run the kernel in Python on any device, for tests.
    """
    splash = compat.splash_attention()
    B, T, N, _ = q.shape
    S = k.shape[1]
    padded_T, padded_S = _round_up(T), _round_up(S)
    term = mask.terms[0]
    kernel = splash.make_splash_mha(
        splash.splash_attention_mask.MultiHeadMask([_mask(splash, term, padded_T, padded_S)] * N),
        block_sizes=_block_sizes(splash, padded_T, padded_S),
        attn_logits_soft_cap=soft_cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    q, k, v = (
        _pad(array, length).swapaxes(1, 2)  # [B, heads, length, H]
        for array, length in (
            ((q.astype(jnp.float32) * scale).astype(q.dtype), padded_T),
            (k, padded_S),
            (v, padded_S),
        )
    )
    segments = None
    if term.segments or (padded_T, padded_S) != (T, S):
        segments = _segments(splash, mask, term, B, T, S)
    run = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0, None))
    out = run(q, k, v, segments, sinks).swapaxes(1, 2)[:, :T]
    if not term.segments and (term.window is None or T <= S):
        return out  # every query sees a key
    some = mask.dense(T, S).any(axis=-1)
    return jnp.where(some[:, :, None, None], out, jnp.zeros((), out.dtype))


def _mask(splash, term: Term, T: int, S: int):
    """The static part of `term` for T queries and S keys."""
    if term.window is not None:
        return splash.LocalMask((T, S), window_size=(term.window - 1, 0), offset=0)
    return splash.CausalMask((T, S)) if term.causal else splash.FullMask((T, S))


def _segments(splash, mask: Mask, term: Term, B: int, T: int, S: int):
    """Segments as the kernel compares them; keys padded here get -1, which no query has.

    Segment 0 may meet itself in the kernel: those rows are put to 0 outside.
    """
    queries, keys = jnp.ones((1, T), jnp.int32), jnp.ones((1, S), jnp.int32)
    if term.segments:
        queries, keys = mask.query_segments, mask.key_segments
    queries = jnp.broadcast_to(_pad(queries, _round_up(T)), (B, _round_up(T)))
    keys = jnp.broadcast_to(_pad(keys, _round_up(S), -1), (B, _round_up(S)))
    return splash.SegmentIds(q=queries, kv=keys)


def _block_sizes(splash, T: int, S: int):
    """The same blocks forward and backward: the largest that divide the lengths."""
    block_q = next(size for size in BLOCKS if T % size == 0)
    block_k = next(size for size in BLOCKS if S % size == 0)
    return splash.BlockSizes(
        block_q=block_q,
        block_kv=block_k,
        block_kv_compute=block_k,
        block_q_dkv=block_q,
        block_kv_dkv=block_k,
        block_kv_dkv_compute=block_k,
        block_q_dq=block_q,
        block_kv_dq=block_k,
    )


def _round_up(length: int) -> int:
    return -(-length // LANES) * LANES


def _pad(array, length: int, fill=0):
    """Axis 1 padded to `length`."""
    widths = [(0, length - array.shape[1] if axis == 1 else 0) for axis in range(array.ndim)]
    return jnp.pad(array, widths, constant_values=fill)
