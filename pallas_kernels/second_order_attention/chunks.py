"""Second-order attention in chunks: squared scores inside, a state between; linear in T."""

import jax
import jax.numpy as jnp

from pallas_kernels.second_order_attention.terms import (
    feature_count,
    features,
    in_two,
    make_terms,
    normalized,
    wide_type,
    with_ones,
)


def default_chunk(size: int) -> int:
    """Tokens of a chunk. Scores cost 4 C K a token and states 4 P V, so C far below P is free."""
    return 64 if size < 32 else 256


def second_order_attention(q, k, v, g, *, scale, initial_state, documents, chunk_size=None):
    """As `ref.second_order_attention`, with memory for T / C states of P (V + 1) numbers.

    A chunk is computed again in the backward pass. bf16 q, k and v meet in bf16 products; states
    and features stay in fp32.
    """
    T = q.shape[1]
    size = min(T, chunk_size or default_chunk(q.shape[3]))
    wide = wide_type(v)
    precision = "highest" if v.dtype == wide else "high"  # TF32 keeps more than bf16 inputs have
    q, k, v, g, index = make_terms(q, k, v, g, documents)
    heads = [_cut(x, 2, size) for x in (q, k, with_ones(v, multiple=8), g)]
    index = _cut(jnp.pad(index, ((0, 0), (0, -T % size)), mode="edge"), 1, size)
    causal = jnp.tril(jnp.ones((size, size), bool))

    def product(form, x, y):
        return jnp.einsum(form, x, y, preferred_element_type=wide, precision=precision)

    @jax.checkpoint
    def step(carry, chunk):
        state, document = carry
        q, k, v1, g, index = chunk
        parts = [jnp.cumsum(part, axis=2) for part in in_two(g)]
        sums = sum(parts)
        sees = causal[None] & (index[:, :, None] == index[:, None])
        # Masked before the exponential: above the diagonal it would overflow.
        gaps = sum(part[..., None] - part[..., None, :] for part in parts)
        gaps = jnp.where(sees[:, None], gaps, -jnp.inf)
        weights = jnp.square(scale * product("bnik,bnjk->bnij", q, k)) * jnp.exp(gaps)
        out = product("bnij,bnjv->bniv", weights.astype(v1.dtype), v1)
        kept = jnp.exp(jnp.where((index == document[:, None])[:, None], sums, -jnp.inf))
        before = product("bnip,bnpv->bniv", features(q.astype(wide)), state)
        out = out + kept[..., None] * before
        last = (index == index[:, -1:])[:, None]
        left = sum(part[..., -1:] - part for part in parts)
        to_end = jnp.exp(jnp.where(last, left, -jnp.inf))
        added = features(scale * k.astype(wide)) * to_end[..., None]
        state = kept[:, :, -1, None, None] * state
        state = state + product("bnjp,bnjv->bnpv", added, v1.astype(wide))
        return (state, index[:, -1]), normalized(out, v.shape[3]).astype(v1.dtype)

    columns = heads[2].shape[-1]
    if initial_state is None:
        sizes = (*q.shape[:2], feature_count(q.shape[3]), columns)
        initial_state = jnp.zeros_like(q, wide, sizes)
    short = columns - initial_state.shape[3]
    initial_state = jnp.pad(initial_state, ((0, 0), (0, 0), (0, 0), (0, short)))
    carry = (initial_state.astype(wide), jnp.zeros_like(index[0, :, 0]))
    (state, _), out = jax.lax.scan(step, carry, (*heads, index))
    out = jnp.moveaxis(out, (0, 3), (1, 2))  # [B, chunks, C, N, V]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :T], state[..., : v.shape[3] + 1]


def _cut(x, axis, size):
    """[chunks, ..., size, ...] of `x` along `axis`, zeros at the end."""
    short = -x.shape[axis] % size
    x = jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)
