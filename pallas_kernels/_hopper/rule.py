"""Linear attention and the delta rule with a decay a head on Hopper, forward and backward."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._hopper import delta, linear
from pallas_kernels._hopper.arranged import arranged, over_shared, padded, warpgroups
from pallas_kernels._hopper.frame import PROGRAMS
from pallas_kernels._hopper.prepare import PAIR, prepare
from pallas_kernels._hopper.reverse import reverse
from pallas_kernels._hopper.scan import scan
from pallas_kernels._hopper.tiles import CHUNK, TILE

MOST_PIECES = 8  # of a row


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N"] | None,
    beta: Float[Array, "B T N"] | None,
    initial_state: Float[Array, "B N K V"],
    documents: Int[Array, "B T"] | None,
    scale: float,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """(o, final state); without beta linear attention, with it the delta rule.

    bfloat16 or float16 q, k and v, fp32 g, beta and states. K and V are 64 or 128.
    documents: number of each token's document, never falling. The backward pass gets what `prepare`
    gave the forward pass, and of the delta rule what was written; states it keeps in registers.
    Linear attention without g has no decay.
    """
    return run(q, k, v, g, beta, initial_state, documents, scale, gives="out")[0]


def forward(*arguments):
    return run(*arguments, gives="out" if arguments[4] is None else "residuals")


def run(q, k, v, g, beta, initial_state, documents, scale, gives):
    """Results, and what the backward pass needs."""
    tokens = q.shape[1]
    arguments = q, k, v, g, beta, initial_state, documents
    q, k, v, g, beta, state, documents = arranged(*arguments)
    pieces = (
        1
        if beta is not None
        else pieces_of(v.shape[1], v.shape[0] * v.shape[2] * (v.shape[3] // TILE))
    )
    prepared = prepare(q, k, g, beta, documents, scale=scale, pieces=pieces)
    _, gates, scores, inverse = prepared
    many = {"scale": scale, "warpgroups": warpgroups(v.shape[3], v.shape[0] * v.shape[2] * pieces)}
    if pieces > 1:
        q, k, v = (in_pieces(x, pieces) for x in (q, k, v))
        zeros = jnp.zeros((v.shape[0], *state.shape[1:]), jnp.float32)
        added = scan(None, k, v, gates, None, None, zeros, gives="final", **many)[-1]
        state = starts(added, gates, state)
    given = q, k, v, gates, scores, inverse, state
    if beta is None:
        kept = (arguments, prepared[:2], state)
        o, _, _, state = scan(*given, gives=gives, **many)
    else:
        parts = pieces_of(v.shape[1], v.shape[0] * v.shape[2])  # `delta` has a program a head
        o, *left, state = scan(*given, gives=gives, **many, pieces=parts)
        kept = (arguments, prepared, left)
    o, state = o.reshape(-1, pieces * o.shape[1], *o.shape[2:]), state[pieces - 1 :: pieces]
    return (o[:, :tokens], jnp.swapaxes(state, 2, 3)), kept


def backward(scale, kept, cotangents):
    (arguments, prepared, left), (d_out, d_final) = kept, cotangents
    tokens, heads = arguments[0].shape[1:3]
    q, k, v, _, beta, _, documents = arranged(*arguments)
    row = q, k, v, padded(d_out.astype(q.dtype), q.shape[1]), documents
    if beta is None:
        state, decays = jnp.swapaxes(left, 2, 3), arguments[3] is not None
        d_q, d_k, d_v, d_g, d_state = of_linear(*row, prepared, state, d_final, scale, decays)
        d_beta = None
    else:
        given = beta, prepared, left, arguments[5], d_final, scale
        d_q, d_k, d_v, d_g, d_beta, d_state = of_delta(*row, *given)

    d_g, d_beta = (None if x is None else jnp.swapaxes(x, 1, 2)[:, :tokens] for x in (d_g, d_beta))
    d_q, d_k = (over_shared(x[:, :tokens], heads) for x in (d_q, d_k))
    return d_q, d_k, d_v[:, :tokens], d_g, d_beta, d_state, None


def of_linear(q, k, v, d_out, documents, prepared, state, d_final, scale, decays):
    """(d_q, d_k, d_v, d_g, d_state) of linear attention, whose rows run in pieces as forwards.

    state: before each piece; prepared: summed and gates. d_g is None without decays.
    """
    B, pieces = v.shape[0], state.shape[0] // v.shape[0]
    summed, gates = prepared
    if pieces > 1:
        q, k, v, d_out = (in_pieces(x, pieces) for x in (q, k, v, d_out))
        documents = None if documents is None else in_pieces(documents, pieces)
        summed = in_pieces(jnp.swapaxes(summed, 1, 2), pieces).swapaxes(1, 2)
        added = linear.added(gates, d_out, q, scale=scale)
        d_final = starts(added, gates, d_final, backwards=True)
    d_q, d_k, d_v, d_g, d_state = linear.gradients(
        q, k, v, d_out, summed, gates, documents, state, d_final, scale=scale, decays=decays
    )
    d_q, d_k, d_v = (x.reshape(B, -1, *x.shape[2:]) for x in (d_q, d_k, d_v))
    if decays:
        d_g = jnp.swapaxes(d_g, 1, 2).reshape(B, -1, d_g.shape[1]).swapaxes(1, 2)
    return d_q, d_k, d_v, d_g, d_state[::pieces]


def of_delta(q, k, v, d_out, documents, beta, prepared, left, state, d_final, scale):
    """(d_q, d_k, d_v, d_g, d_beta, d_state) of the delta rule, whose rows `delta` runs in pieces.

    left: the values written, and the state before each piece if there are more than one.
    """
    summed, gates, scores, inverse = prepared
    values, states = left
    pieces = 1 if states is None else states.shape[2]
    d_v, d_states, d_state = reverse(
        q, k, d_out, gates, scores, inverse, jnp.swapaxes(d_final, 2, 3),
        scale=scale, warpgroups=warpgroups(v.shape[3], v.shape[0] * v.shape[2]), pieces=pieces,
    )  # fmt: skip
    if pieces > 1:
        state, d_final = (
            jnp.moveaxis(x, (2, 4), (1, 3)).reshape(-1, *state.shape[1:])
            for x in (states, d_states)
        )
    d_q, d_k, d_g, d_beta = delta.gradients(
        q, k, values, d_out, d_v, beta, summed, gates, documents, state, d_final,
        scale=scale, pieces=pieces,
    )  # fmt: skip
    return d_q, d_k, d_v, d_g, d_beta, jnp.swapaxes(d_state, 2, 3)


chunked.defvjp(forward, backward)


def pieces_of(tokens: int, programs: int) -> int:
    """Parts of a row that run side by side, where whole rows would be too few programs.

    Without the delta rule a state falls by known decays, so what parts add to it can be summed
    before they run; with it the backward pass alone has parts, whose states `scan` and `reverse`
    meet on their way.
    """
    pieces = 1
    while pieces < MOST_PIECES and 2 * pieces * programs <= PROGRAMS:
        if tokens % (2 * pieces * PAIR * CHUNK):
            break
        pieces *= 2
    return pieces


def in_pieces(x, pieces: int):
    """`x` [B, T, ...] as [B pieces, T / pieces, ...]."""
    return x.reshape(-1, x.shape[1] // pieces, *x.shape[2:])


def starts(added, gates, state, backwards=False):
    """The state before each piece [B pieces, ...], from what the pieces by themselves add.

    backwards: the gradient of the state after each piece.
    """
    B = state.shape[0]
    kept = jnp.prod(gates[:, :, :, 0, -1], axis=2)[:, :, None, None]
    kept, added = (x.reshape(B, -1, *x.shape[1:]) for x in (kept, added))
    before, order = [], range(added.shape[1])
    for piece in reversed(order) if backwards else order:
        before.append(state)
        state = state * kept[:, piece] + added[:, piece]
    if backwards:
        before.reverse()
    return jnp.stack(before, axis=1).reshape(-1, *state.shape[1:])
