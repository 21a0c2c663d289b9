"""Linear attention in chunks with no decay or one a head: dense products, and a scan of states."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._core.decay_sums import FLOOR, sums
from pallas_kernels._core.recurrence import Documents
from pallas_kernels.gated_linear_attention import chunks, xla_vector
from pallas_kernels.gated_linear_attention.chunks import product, scaled


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N *K"] | None,
    *,
    scale: float,
    initial_state: Float[Array, "B N K V"] | None,
    documents: Documents | None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """As `ref.gated_linear_attention`; memory is linear in T, forward and backward.

    Chunk form of Mamba-2 (arXiv 2405.21060, section 6) and, for a decay of each feature, of GLA
    (2312.06635, section 4). Products are of the dtype of q with fp32 sums; decays and states fp32.
    The backward pass keeps the arguments and finds the states of the chunks again.
    chunk_size: at most 128; None: by the sizes.
    """
    rows, length, _, features = q.shape
    size = chunk_size or _chunk_size(length, features)
    if initial_state is None:
        sizes = (rows, v.shape[2], features, v.shape[3])
        initial_state = jnp.zeros_like(v, jnp.float32, sizes)
    run = xla_vector.attend if g is not None and g.ndim == 4 else attend
    return run(q, k, v, g, initial_state.astype(jnp.float32), documents, scale, size)


def _chunk_size(length: int, features: int) -> int:
    """Twice as many tokens where the states, [K, V] a chunk, outweigh them."""
    most = 128 if features > 256 else 64
    return min(most, 1 << max(4, (length - 1).bit_length()))


class Chunked(NamedTuple):
    """The arguments in chunks, and the decays between tokens and states."""

    q: Float[Array, "M B H L K"]
    k: Float[Array, "M B H L K"]
    v: Float[Array, "M B H R L V"]
    pair: Float[Array, "m b h r L L"]  # from token j to token i
    read: Float[Array, "m b h r L 1"]  # from the state before to token i
    write: Float[Array, "m b h r L 1"]  # from token j to the state after
    keep: Float[Array, "m b h r 1 1"]  # from state to state


def _chunked(q, k, v, g, documents, size) -> Chunked:
    heads = q.shape[2]
    k = chunks.without_padding(k, documents)
    mask = chunks.masks(documents, size)
    q, k, v = (chunks.split(x, size) for x in (q, k, v))
    pair, read, write, keep = (x[:, :, None, None] for x in mask[:4])
    if g is None:
        decays = (x.astype(jnp.float32) for x in (pair, read, write, keep))
    else:
        g = chunks.grouped(chunks.split(g, size), heads)
        cumulated = sums(jnp.where(mask.gate[:, :, None, None], g, 0.0), axis=-1)
        decays = (
            chunks.masked_exp(cumulated[..., :, None] - cumulated[..., None, :], pair),
            chunks.masked_exp(cumulated.total(), read),
            chunks.masked_exp(cumulated[..., -1:] - cumulated, write),
            chunks.masked_exp(cumulated[..., -1].total(), keep),
        )
    pair, read, write, keep = decays
    v = chunks.grouped(v, heads)
    return Chunked(q, k, v, pair, read[..., None], write[..., None], keep[..., None, None])


def _states(c: Chunked, initial_state):
    """Final state [B, H, R, K, V], and those that the chunks meet [M, B, H, R, K, V]."""
    update = product("mbhjk,mbhrjv->mbhrkv", c.k, scaled(c.v, c.write))
    first = initial_state.reshape(update.shape[1:])
    return chunks.scan_states(first, c.keep, update, c.k.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend(q, k, v, g, initial_state, documents, scale: float, size: int):
    """(o fp32, final state): o_i = sum_j (q_i k_j) pair_ij v_j + read_i q_i S, for each chunk."""
    c = _chunked(q, k, v, g, documents, size)
    scores = scale * product("mbhik,mbhjk->mbhij", c.q, c.k)[:, :, :, None]
    o = product("mbhrij,mbhrjv->mbhriv", (scores * c.pair).astype(c.v.dtype), c.v)
    final_state, states = _states(c, initial_state)
    o += scale * c.read * product("mbhik,mbhrkv->mbhriv", c.q, states)
    return chunks.join_groups(o, q.shape[1]), final_state.reshape(initial_state.shape)


def _forward(q, k, v, g, initial_state, documents, scale, size):
    arguments = (q, k, v, g, initial_state, documents)
    return attend(*arguments, scale, size), arguments


def _backward(scale, size, arguments, cotangents):
    """Every product transposed, and a reverse scan for the gradients of the states."""
    q, k, v, g, initial_state, documents = arguments
    d_o, d_final = cotangents
    length, dtype = q.shape[1], q.dtype
    c = _chunked(q, k, v, g, documents, size)
    _, states = _states(c, initial_state)
    d_o = scale * chunks.grouped(chunks.split(d_o, size), q.shape[2])  # q is never scaled
    d_read = c.read * d_o
    update = product("mbhik,mbhriv->mbhrkv", c.q, d_read.astype(dtype))
    d_first = d_final.reshape(update.shape[1:])
    d_initial, d_states = chunks.scan_states(d_first, c.keep, update, dtype, reverse=True)

    narrow = d_o.astype(dtype)
    scores = product("mbhik,mbhjk->mbhij", c.q, c.k)[:, :, :, None]
    d_weights = c.pair * product("mbhriv,mbhrjv->mbhrij", narrow, c.v)  # of scores, a value head
    d_scores = jnp.sum(d_weights, axis=3).astype(dtype)
    d_q = product("mbhij,mbhjk->mbhik", d_scores, c.k)
    d_q += product("mbhriv,mbhrkv->mbhik", d_read.astype(dtype), states)
    d_k = product("mbhij,mbhik->mbhjk", d_scores, c.q)
    d_k += product("mbhrjv,mbhrkv->mbhjk", scaled(c.v, c.write), d_states)
    d_v_state = c.write * product("mbhjk,mbhrkv->mbhrjv", c.k, d_states)
    d_v = product("mbhrij,mbhriv->mbhrjv", (scores * c.pair).astype(dtype), narrow) + d_v_state

    d_g = None
    if g is not None:
        # A decay scales all that passes its token: pairs on both sides of it, what later tokens
        # read, what earlier ones write, and the state that is kept.
        passed = scores * d_weights * jnp.tril(jnp.ones((size, size)), -1)[None, None, None, None]
        reads = d_read * product("mbhik,mbhrkv->mbhriv", c.q, states)
        later = jnp.sum(passed, axis=5) - jnp.sum(passed, axis=4) + jnp.sum(reads, axis=5)
        writes = jnp.sum(c.v.astype(jnp.float32) * d_v_state, axis=5)
        kept = jnp.sum(states.astype(jnp.float32) * d_states.astype(jnp.float32), axis=(4, 5))
        d_g = chunks.gate_gradient(later, writes, c.keep[..., 0, 0] * kept, axis=4)
        used = chunks.masks(documents, size).gate[:, :, None, None]
        d_g = chunks.join_groups(jnp.where(used, d_g, 0.0), length)
        d_g = jnp.where(g > FLOOR, d_g, 0.0)
    return (
        chunks.join(d_q, length).astype(dtype),
        chunks.without_padding(chunks.join(d_k, length), documents).astype(dtype),
        chunks.join_groups(d_v, length).astype(dtype),
        d_g,
        d_initial.reshape(initial_state.shape),
        None,
    )


attend.defvjp(_forward, _backward)
