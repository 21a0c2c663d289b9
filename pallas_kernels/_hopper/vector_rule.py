"""The gated delta rule with a decay a key feature on Hopper, forward and backward."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._hopper.arranged import arranged, over_shared, padded, warpgroups
from pallas_kernels._hopper.vector_gradients import gradients
from pallas_kernels._hopper.vector_prepare import prepare
from pallas_kernels._hopper.vector_reverse import reverse
from pallas_kernels._hopper.vector_scan import scan


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def chunked(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N K"],
    beta: Float[Array, "B T N"],
    initial_state: Float[Array, "B N K V"],
    documents: Int[Array, "B T"] | None,
    scale: float,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """(o, final state).

    bfloat16 q, k and v, fp32 g, beta and states. K and V are 64 or 128.
    documents: number of each token's document, never falling. The backward pass gets what `prepare`
    gave the forward pass.
    """
    return run(q, k, v, g, beta, initial_state, documents, scale, sums=False)[0]


def forward(*arguments):
    results, prepared = run(*arguments, sums=True)
    return results, (arguments[:7], prepared)


def run(q, k, v, g, beta, initial_state, documents, scale, sums):
    """Results, and what the backward pass needs beside the arguments."""
    tokens = v.shape[1]
    q, k, v, g, beta, state, documents = arranged(q, k, v, g, beta, initial_state, documents)
    prepared = prepare(q, k, g, beta, documents, scale=scale, sums=sums)
    o, _, _, state = scan(prepared, v, state, scale=scale, gives="out", warpgroups=tiles_of(v))
    return (o[:, :tokens], jnp.swapaxes(state, 2, 3)), prepared


def backward(scale, kept, cotangents):
    """States before chunks again, gradients of those after them, then all chunks side by side."""
    (arguments, prepared), (d_out, d_final) = kept, cotangents
    tokens, heads = arguments[0].shape[1:3]
    q, k, v, _, beta, state, documents = arranged(*arguments)
    d_out, count = padded(d_out.astype(q.dtype), q.shape[1]), tiles_of(v)
    _, values, states, _ = scan(prepared, v, state, scale=scale, gives="states", warpgroups=count)
    d_v, d_states, d_state = reverse(
        prepared, d_out, jnp.swapaxes(d_final, 2, 3), scale=scale, warpgroups=count
    )
    d_q, d_k, d_g, d_beta = gradients(
        q, k, prepared.summed, documents, beta, values, d_out, d_v, states, d_states, scale=scale
    )
    d_q, d_k = (over_shared(x[:, :tokens], heads) for x in (d_q, d_k))
    d_beta = jnp.swapaxes(d_beta, 1, 2)[:, :tokens]
    return d_q, d_k, d_v[:, :tokens], d_g[:, :tokens], d_beta, jnp.swapaxes(d_state, 2, 3), None


def tiles_of(v):
    """Of value features, that a processor takes."""
    return warpgroups(v.shape[3], v.shape[0] * v.shape[2])


chunked.defvjp(forward, backward)
