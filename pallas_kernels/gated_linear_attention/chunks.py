"""What the chunk forms share: layout, masks of documents, scans of states.

Sizes: M chunks of L tokens, B rows, H key heads, R value heads for each of them, K and V features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from pallas_kernels._core.recurrence import Documents


class Masks(NamedTuple):
    """Who sees whom. pair: token j reaches token i of its chunk (never from later, nor from another
    document). read: the state before the chunk reaches token i. write: token j reaches the state
    after it. keep: the state before reaches the state after. gate: the token's decay is used.
    """

    pair: Bool[Array, "m b L L"]
    read: Bool[Array, "m b L"]
    write: Bool[Array, "m b L"]
    keep: Bool[Array, "m b"]
    gate: Bool[Array, "m b L"]


def split(x, size: int):
    """[B, T, N, ...] to [M, B, N, L, ...], padded at the end by zeros."""
    widths = [(0, -x.shape[1] % size if axis == 1 else 0) for axis in range(x.ndim)]
    x = jnp.pad(x, widths)
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, (0, 1, 2, 3), (1, 0, 3, 2))


def join(x, length: int):
    """[M, B, N, L, ...] to [B, T, N, ...]."""
    x = jnp.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def grouped(x, heads: int):
    """[M, B, N, ...] to [M, B, H, R, ...]."""
    return x.reshape(*x.shape[:2], heads, -1, *x.shape[3:])


def join_groups(x, length: int):
    """[M, B, H, R, L, ...] to [B, T, N, ...]."""
    return join(x.reshape(*x.shape[:2], -1, *x.shape[4:]), length)


def without_padding(k, documents: Documents | None):
    """Keys [B, T, H, K], or their gradients, 0 where a token is padding."""
    if documents is None:
        return k
    return jnp.where(documents.real[:, :, None, None], k, jnp.zeros((), k.dtype))


def masks(documents: Documents | None, size: int) -> Masks:
    """Of packed documents; without, the sizes m and b are 1."""
    causal = jnp.tril(jnp.ones((size, size), bool))[None, None]
    if documents is None:
        every = jnp.ones((1, 1, size), bool)
        return Masks(causal, every, every, every[..., 0], every)
    padding = ((0, 0), (0, -documents.index.shape[1] % size))
    rows = documents.index.shape[0]
    cut = lambda x: jnp.moveaxis(x.reshape(rows, -1, size), 1, 0)  # noqa: E731
    flat = jnp.pad(documents.index, padding, mode="edge")
    real = cut(jnp.pad(documents.real, padding))
    index, starts = cut(flat), cut(jnp.diff(flat, axis=1, prepend=0) > 0)
    last = index[:, :, -1]
    before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    return Masks(
        causal & (index[..., :, None] == index[..., None, :]),
        index == before[..., None],
        index == last[..., None],
        before == last,
        real & ~starts,
    )


def masked_exp(exponent, mask):
    """exp where `mask` holds, else 0; masked before exp, so that nothing overflows."""
    return jnp.exp(jnp.where(mask, exponent, -jnp.inf))


def product(subscripts: str, a, b):
    """einsum with fp32 results; fp32 operands are multiplied as such on every device."""
    precision = "highest" if a.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def scaled(x, factor):
    """x times an fp32 factor, in the dtype of x."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def gate_gradient(later, writes, kept, axis: int):
    """Gradient of each token's log decay, from what passes the token; the tokens are along `axis`.

    later: what the pairs give and the reads, of which those at and after the token count. writes:
    what reaches the state after the chunk, of which those before the token count. kept, without
    that axis: from the state before the chunk to that after it.
    """
    after = jax.lax.cumsum(later, axis=axis, reverse=True)
    first = jax.lax.broadcasted_iota(jnp.int32, writes.shape, axis) == 0
    before = jnp.where(first, 0.0, jnp.roll(jax.lax.cumsum(writes, axis=axis), 1, axis))
    return after + before + jnp.expand_dims(kept, axis)


def scan_states(first, keep, update, dtype, reverse: bool = False):
    """State after all chunks (before, if reverse), and that which each chunk meets, in `dtype`.

    first [B, H, R, K, V]; update [M, B, H, R, K, V]; keep as that, or with sizes of 1.
    """
    keep = jnp.broadcast_to(keep, (update.shape[0], *keep.shape[1:]))

    def step(state, chunk):
        keep, update = chunk
        return keep * state + update, state.astype(dtype)

    return jax.lax.scan(step, first, (keep, update), reverse=reverse)
