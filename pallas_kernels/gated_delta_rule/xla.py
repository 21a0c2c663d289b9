"""The gated delta rule in chunks, for any backend: products of matrices, and a scan over chunks."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels._core.decay_sums import sums
from pallas_kernels._core.recurrence import Documents
from pallas_kernels.gated_delta_rule import chunk

CHUNK = 64  # tokens


class Chunks(NamedTuple):
    """The inputs in n chunks of C tokens; N = H r value heads."""

    q: Float[Array, "n B H C K"]
    k: Float[Array, "n B H C K"]
    v: Float[Array, "n B H r C V"]
    g: Float[Array, "n B H r c D"] | None  # [1, C], or [C, K] for vector decay
    beta: Float[Array, "n B H r 1 C"]
    documents: Float[Array, "n B 1 C"] | None  # started since the token before the chunk


def gated_delta_rule(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N *K"] | None,
    beta: Float[Array, "B T N"],
    *,
    scale: float,
    initial_state: Float[Array, "B N K V"] | None,
    documents: Documents | None,
    chunk_size: int = CHUNK,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """`ref.gated_delta_rule` by the WY form of chunks (arXiv 2412.06464, section 3.3).

    Memory is linear in T: the backward pass keeps the inputs and computes all else again. bf16
    inputs are multiplied as bf16 with fp32 sums; decays, the triangular inverse and the state are
    fp32. chunk_size: a power of two, at least 16.
    """
    B, T, H, K = q.shape
    N, V = v.shape[2:]
    chunks = split(q, k, v, g, beta, documents, chunk_size)
    state = initial_state
    if state is None:
        state = jnp.zeros_like(v, jnp.float32, (B, N, K, V))
    o, state = _rule(chunks, state.astype(jnp.float32).reshape(B, H, N // H, K, V), float(scale))
    o = jnp.moveaxis(o, (0, 4), (1, 2)).reshape(B, -1, N, V)[:, :T]
    return o, state.reshape(B, N, K, V)


def split(q, k, v, g, beta, documents: Documents | None, chunk_size: int) -> Chunks:
    """Padded and cut into chunks; tokens that pad have k = 0, beta = 0, g = 0."""
    (B, T, H), N = q.shape[:3], v.shape[2]
    C = min(chunk_size, max(16, 2 ** (T - 1).bit_length()))
    n = -(-T // C)
    g, beta = chunk.gates(g, beta, documents)

    def cut(x, heads):  # [B, T, heads, ...] -> [n, B, *heads, C, ...]
        pad = [(0, 0)] * x.ndim
        pad[1] = (0, n * C - T)
        x = jnp.pad(x, pad).reshape(B, n, C, *heads, *x.shape[3:])
        return jnp.moveaxis(x, (1, 2), (0, 2 + len(heads)))

    q, k = (cut(x, (H,)) for x in (q, k))
    v, beta = (cut(x, (H, N // H)) for x in (v, beta))
    if g is not None:
        cut_g = cut(g, (H, N // H))
        g = cut_g[..., None, :] if g.ndim == 3 else cut_g
    started = None
    if documents is not None:
        started = chunk.documents_started(documents.index, C).swapaxes(0, 1)[:, :, None]
    return Chunks(q, k, v, g, beta[..., None, :], started)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rule(chunks: Chunks, state, scale: float):
    """(o [n, B, H, r, C, V], final state) for the state [B, H, r, K, V] of the beginning."""
    parts = _rounded(_parts(*chunks[:2], *chunks[3:], scale), chunks.v.dtype)

    def step(state, chunk):
        return _advance(state, *chunk)

    state, o = jax.lax.scan(step, state, (parts, chunks.v))
    return o.astype(chunks.v.dtype), state


def _rule_forward(chunks, state, scale):
    return _rule(chunks, state, scale), (chunks, state)


def _rule_backward(scale, residuals, cotangents):
    """States before all chunks again, then chunks from the last to the first."""
    (q, k, v, g, beta, documents), state = residuals
    d_o, d_state = cotangents
    parts, pull = jax.vjp(lambda q, k, g, beta: _parts(q, k, g, beta, documents, scale),
                          q, k, g, beta)  # fmt: skip
    parts = _rounded(parts, v.dtype)

    def step(state, chunk):
        return _advance(state, *chunk)[0], state.astype(v.dtype)

    def back(d_state, chunk):
        d_o, state, parts, v = chunk
        # In fp32, so that their gradients are, which cancel where keys are alike.
        state, parts = jax.tree.map(lambda x: x.astype(jnp.float32), (state, parts))
        _, pull = jax.vjp(_advance, state, parts, v)
        d_state, *d_chunk = pull((d_state, d_o.astype(jnp.float32)))
        return d_state, d_chunk

    _, states = jax.lax.scan(step, state, (parts, v))
    d_state, (d_parts, d_v) = jax.lax.scan(back, d_state, (d_o, states, parts, v), reverse=True)
    d_q, d_k, d_g, d_beta = pull(d_parts)
    d_documents = None if documents is None else jnp.zeros_like(documents)
    return Chunks(d_q, d_k, d_v, d_g, d_beta, d_documents), d_state


_rule.defvjp(_rule_forward, _rule_backward)


def _parts(q, k, g, beta, documents, scale: float) -> chunk.Parts:
    """`chunk.prepare` for all chunks and heads, in fp32."""
    G = None if g is None else sums(g, axis=5 if g.shape[4] == 1 else 4)

    def prepare(q, k, G, beta, documents):
        return chunk.prepare(
            q.astype(jnp.float32), k.astype(jnp.float32), G, beta, documents,
            scale=scale, dtype=q.dtype, invert=_invert,
        )  # fmt: skip

    for axes in ((None, None, 0, 0, None), (0, 0, 0, 0, None), 0, 0):  # r, H, B, n
        prepare = jax.vmap(prepare, in_axes=axes)
    return prepare(q, k, G, beta, documents)


def _rounded(parts: chunk.Parts, dtype) -> chunk.Parts:
    """As operands of products, which is all but `keep`."""
    return chunk.Parts(*(x.astype(dtype) for x in parts[:-1]), parts.keep)


def _advance(state, parts: chunk.Parts, v):
    """`chunk.advance` for all heads of one chunk."""

    def advance(state, parts, v):
        return chunk.advance(state, parts, v.astype(jnp.float32), v.dtype)

    for _ in range(3):  # r, H, B
        advance = jax.vmap(advance)
    return advance(state, parts, v)


def _invert(lower):
    """(I + lower)^-1 by forward substitution."""
    unit = jnp.eye(lower.shape[0], dtype=lower.dtype)

    def solve(lower):
        return jax.scipy.linalg.solve_triangular(lower + unit, unit, lower=True, unit_diagonal=True)

    # LAPACK's solver takes four times as long for a batch of these, and waits for threads that
    # collectives of other devices hold: a mesh of CPU devices can stand still for ever.
    def row_by_row(lower):
        return jax.lax.fori_loop(
            1, lower.shape[0], lambda i, inverse: inverse.at[i].add(-lower[i] @ inverse),
            unit + jnp.zeros_like(lower),  # of the same type in jax.shard_map as what follows
        )  # fmt: skip

    return jax.lax.platform_dependent(lower, cpu=row_by_row, default=solve)
