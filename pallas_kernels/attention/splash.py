"""Attention by JAX's TPU splash kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels._core import compat
from pallas_kernels.attention.mask import Mask, Term

LANES = 128  # of a TPU vector register; lengths are padded to multiples
BLOCKS = (512, 384, 256, 128)  # tokens, the larger the better as far as VMEM goes
TABLE_BYTES = 3  # that the kernel keeps for each block of a mask in the scalar memory of the core
NONE, ALL = np.zeros((1, 1), bool), np.ones((1, 1), bool)  # what a block of a mask has set
EMPTY = np.float32(1e30)  # instead of the log-sum-exp of no key, in the backward pass


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
    interpret: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`ref.attention` on a TPU, within what `support.TABLE` declares.

    With the log-sum-exp, nothing can be differentiated. interpret: run the kernel in Python on any
    device, for tests.
    """
    T, S = q.shape[1], k.shape[1]
    kernel = _kernel(mask.terms[0], q, S, soft_cap, interpret, save_residuals=return_log_sum_exp)
    segments = _segments(mask, q.shape[0], T, S)
    run = jax.vmap(kernel, in_axes=(0, 0, 0, None if segments is None else 0, None))
    result = run(_heads_first(_scaled(q, scale)), _heads_first(k), _heads_first(v), segments, sinks)
    out, (lse,) = result if return_log_sum_exp else (result, (None,))
    out = out.swapaxes(1, 2)[:, :T]
    lse = lse.swapaxes(1, 2)[:, :T] if return_log_sum_exp else None
    term = mask.terms[0]
    if term.segments or (term.window is not None and T > S):  # else every query sees a key
        some = mask.dense(T, S).any(axis=-1)[:, :, None]
        out = jnp.where(some[..., None], out, jnp.zeros((), out.dtype))
        lse = jnp.where(some, lse, -jnp.inf) if return_log_sum_exp else None
    return (out, lse) if return_log_sum_exp else out


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
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """`ref.gradients` by the kernel's backward pass, rounded to the dtype of q, k and v."""
    T, S = q.shape[1], k.shape[1]
    kernel = _kernel(mask.terms[0], q, S, soft_cap, interpret)
    segments = _segments(mask, q.shape[0], T, S)
    # An empty row has out = 0; a log-sum-exp above any score makes its weights 0 as well.
    lse = jnp.where(log_sum_exp == -jnp.inf, EMPTY, log_sum_exp)
    arrays = (_scaled(q, scale), k, v, out, d_out.astype(q.dtype))
    run = jax.vmap(
        functools.partial(compat.splash_attention_gradients, kernel),
        in_axes=(0, 0, 0, None if segments is None else 0, 0, 0, 0),
    )
    q, k, v, out, d_out = (_heads_first(array) for array in arrays)
    lse = _pad(lse, q.shape[2], EMPTY).swapaxes(1, 2)
    parts = run(q, k, v, segments, lse, out, d_out)
    dq, dk, dv = (part.astype(jnp.float32).swapaxes(1, 2) for part in parts)
    return scale * dq[:, :T], dk[:, :S], dv[:, :S]


def table_bytes(term: Term, T: int, S: int) -> int:
    """Bytes of the kernel's table of blocks, which is as wide as its longest row."""
    (rows, block_q), (columns, block_k) = (
        (length // block, block) for length in map(_round_up, (T, S)) for block in [_block(length)]
    )
    if term.window is not None:
        columns = min(columns, -(-(term.window + block_q) // block_k) + 1)
    return TABLE_BYTES * rows * columns


def _kernel(term: Term, q, S: int, soft_cap, interpret: bool, save_residuals: bool = False):
    """The kernel for these sizes and the static part of `term`."""
    splash = compat.splash_attention()
    T, S = _round_up(q.shape[1]), _round_up(S)
    return splash.make_splash_mha(
        splash.splash_attention_mask.MultiHeadMask([_mask(splash, term, T, S)] * q.shape[2]),
        block_sizes=_block_sizes(splash, T, S),
        attn_logits_soft_cap=soft_cap,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        save_residuals=save_residuals,
        residual_checkpoint_name="attention",
    )


def _scaled(q, scale: float):
    return (q.astype(jnp.float32) * scale).astype(q.dtype)


def _heads_first(array):
    """[B, length, heads, H] -> [B, heads, padded length, H]."""
    return _pad(array, _round_up(array.shape[1])).swapaxes(1, 2)


def _mask(splash, term: Term, T: int, S: int):
    """The static part of `term` for T queries and S keys."""
    if not term.causal and term.window is None:

        class Full(splash.FullMask):
            """For the reason below."""

            def __getitem__(self, index):
                return ALL

        return Full((T, S))
    window = T if term.window is None else term.window
    kind = splash.CausalMask if term.window is None else splash.LocalMask

    class Mask(kind):
        """The kernel's builder asks of every block of a mask whether some or all of it is set.

        Most blocks need no T x S comparisons to tell, which took a minute for 128k tokens.
        """

        def __getitem__(self, index):
            queries, keys = index
            least, most = queries.start - (keys.stop - 1), queries.stop - 1 - keys.start
            if most < 0 or least >= window:
                return NONE
            if least >= 0 and most < window:
                return ALL
            return super().__getitem__(index)

    if term.window is None:
        return Mask((T, S))
    return Mask((T, S), window_size=(term.window - 1, 0), offset=0)


def _segments(mask: Mask, B: int, T: int, S: int):
    """Segments as the kernel compares them; keys padded here get -1, which no query has.

    Segment 0 may meet itself in the kernel: those rows are put to 0 outside.
    """
    splash = compat.splash_attention()
    padded_T, padded_S = _round_up(T), _round_up(S)
    if not mask.terms[0].segments and (padded_T, padded_S) == (T, S):
        return None
    queries, keys = jnp.ones((1, T), jnp.int32), jnp.ones((1, S), jnp.int32)
    if mask.terms[0].segments:
        queries, keys = mask.query_segments, mask.key_segments
    queries = jnp.broadcast_to(_pad(queries, padded_T), (B, padded_T))
    keys = jnp.broadcast_to(_pad(keys, padded_S, -1), (B, padded_S))
    return splash.SegmentIds(q=queries, kv=keys)


def _block_sizes(splash, T: int, S: int):
    """The same blocks forward and backward: the largest that divide the lengths."""
    block_q, block_k = _block(T), _block(S)
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


def _block(length: int) -> int:
    return next(size for size in BLOCKS if length % size == 0)


def _round_up(length: int) -> int:
    return -(-length // LANES) * LANES


def _pad(array, length: int, fill=0):
    """Axis 1 padded to `length`."""
    widths = [(0, length - array.shape[1] if axis == 1 else 0) for axis in range(array.ndim)]
    return jnp.pad(array, widths, constant_values=fill)
