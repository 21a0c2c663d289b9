"""Linear attention with a decay and the gated delta rule on Hopper, forward and backward."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._hopper.gradients import PROGRAMS, combine, gradients
from pallas_kernels._hopper.prepare import PAIR, prepare
from pallas_kernels._hopper.reverse import reverse
from pallas_kernels._hopper.scan import scan
from pallas_kernels._hopper.tiles import CHUNK, TILE

MOST_PIECES = 8  # of a row
LEAST = -60.0  # log decay, after which nothing is left; of minus infinity there are no differences
SMALLEST = 1e-15  # of beta, by whose square the backward pass divides


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N"],
    beta: Float[Array, "B T N"] | None,
    initial_state: Float[Array, "B N K V"],
    documents: Int[Array, "B T"] | None,
    scale: float,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """(o, final state); without beta linear attention, with it the delta rule.

    bfloat16 or float16 q, k and v, fp32 g, beta and states. K is 64 or 128, V a multiple of 64.
    documents: number of each token's document, never falling. The backward pass gets what `prepare`
    gave the forward pass, and computes the states of the chunks again.
    """
    return forward(q, k, v, g, beta, initial_state, documents, scale)[0]


def forward(q, k, v, g, beta, initial_state, documents, scale):
    tokens = q.shape[1]
    arguments = q, k, v, g, beta, initial_state, documents
    q, k, v, g, beta, state, documents = arranged(*arguments)
    pieces = 1 if beta is not None else pieces_of(v)
    prepared = prepare(q, k, g, beta, documents, scale=scale, pieces=pieces)
    _, gates, scores, inverse = prepared
    if pieces > 1:
        q, k, v = (x.reshape(-1, x.shape[1] // pieces, *x.shape[2:]) for x in (q, k, v))
        state = starts(k, v, gates, state, scale)
    many = {"scale": scale, "warpgroups": warpgroups(v)}
    o, _, _, state = scan(q, k, v, gates, scores, inverse, state, gives="out", **many)
    if pieces > 1:
        o = o.reshape(-1, pieces * o.shape[1], *o.shape[2:])
        state = state[pieces - 1 :: pieces]
    residuals = arguments, prepared if pieces == 1 else None
    return (o[:, :tokens], jnp.swapaxes(state, 2, 3)), residuals


def backward(scale, residuals, cotangents):
    (arguments, prepared), (d_out, d_final) = residuals, cotangents
    tokens, heads = arguments[0].shape[1:3]
    q, k, v, g, beta, state, documents = arranged(*arguments)
    d_out = padded(d_out.astype(q.dtype), q.shape[1])
    d_final = jnp.swapaxes(d_final, 2, 3)
    many = {"scale": scale, "warpgroups": warpgroups(v)}
    # Of rows in pieces the forward pass has them in another order.
    prepared = prepared or prepare(q, k, g, beta, documents, scale=scale)
    summed, gates, scores, inverse = prepared
    _, states, values, _ = scan(q, k, v, gates, scores, inverse, state, gives="states", **many)
    d_states, d_v, d_state = reverse(q, k, d_out, gates, scores, inverse, d_final, **many)
    values = v if values is None else values
    d_q, d_k, last, dots = gradients(
        q, k, values, d_out, d_v, states, d_states, summed, gates, beta, documents, scale=scale
    )
    d_g = jnp.swapaxes(combine(dots, q.shape[1] // CHUNK), 1, 2)[:, :tokens]
    d_v, d_beta = (last, None) if d_v is None else (d_v, jnp.swapaxes(last, 1, 2)[:, :tokens])

    def over_shared(x):
        """The sum over the value heads that share a query and key head."""
        x = x[:, :tokens]
        if x.shape[2] == heads:
            return x
        x = x.reshape(*x.shape[:2], heads, -1, x.shape[3])
        return jnp.sum(x, axis=3, dtype=jnp.float32).astype(x.dtype)

    return (
        over_shared(d_q), over_shared(d_k), d_v[:, :tokens], d_g, d_beta,
        jnp.swapaxes(d_state, 2, 3), None,
    )  # fmt: skip


chunked.defvjp(forward, backward)


def pieces_of(v) -> int:
    """Parts of a row that run side by side, where there are too few heads to fill the device.

    Without the delta rule a state falls by known decays, so what parts add to it can be summed
    before they run.
    """
    B, T, N, V = v.shape
    pieces = 1
    while pieces < MOST_PIECES and 2 * pieces * B * N * (V // TILE) <= PROGRAMS:
        if T % (2 * pieces * PAIR * CHUNK):
            break
        pieces *= 2
    return pieces


def starts(k, v, gates, state, scale):
    """The state before each piece [B pieces, N, V, K], from what the pieces by themselves add."""
    B = state.shape[0]
    many = {"scale": scale, "warpgroups": warpgroups(v)}
    zeros = jnp.zeros((k.shape[0], *state.shape[1:]), jnp.float32)
    added = scan(None, k, v, gates, None, None, zeros, gives="final", **many)[-1]
    kept = jnp.prod(gates[:, :, :, 0, -1], axis=2)[:, :, None, None]
    before = []
    for piece in range(k.shape[0] // B):
        before.append(state)
        state = state * kept.reshape(B, -1, *kept.shape[1:])[:, piece]
        state = state + added.reshape(B, -1, *added.shape[1:])[:, piece]
    return jnp.stack(before, axis=1).reshape(zeros.shape)


def warpgroups(v) -> int:
    """Tiles of value features a processor takes: two where that leaves none without work."""
    B, _, N, V = v.shape
    return 2 if V % (2 * TILE) == 0 and B * N >= 64 else 1


def padded(x, length: int):
    """`x` [B, T, ...] with zeros up to `length` tokens."""
    missing = length - x.shape[1]
    return x if not missing else jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))


def arranged(q, k, v, g, beta, initial_state, documents):
    """Whole pairs of chunks; gates as [B, N, T]; transposed states; a beta to divide by."""
    length = -(-q.shape[1] // (PAIR * CHUNK)) * PAIR * CHUNK
    if documents is not None:
        documents = jnp.pad(documents, ((0, 0), (0, length - documents.shape[1])), mode="edge")
    q, k, v = (padded(x, length) for x in (q, k, v))
    g = jnp.swapaxes(padded(jnp.maximum(g, LEAST), length), 1, 2)
    if beta is not None:
        beta = jnp.swapaxes(padded(beta, length), 1, 2)
        beta = jnp.where(jnp.abs(beta) < SMALLEST, SMALLEST, beta)
    return q, k, v, g, beta, jnp.swapaxes(initial_state, 2, 3), documents
