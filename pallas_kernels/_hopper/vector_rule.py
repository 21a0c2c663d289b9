"""The gated delta rule with a decay a key feature on Hopper; the backward pass is that of XLA."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels._core.recurrence import Documents
from pallas_kernels._hopper.arranged import arranged, warpgroups
from pallas_kernels._hopper.vector_prepare import prepare
from pallas_kernels._hopper.vector_scan import scan
from pallas_kernels.gated_delta_rule import xla


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
    documents: number of each token's document, never falling.
    """
    tokens, heads = v.shape[1], v.shape[0] * v.shape[2]
    q, k, v, g, beta, state, documents = arranged(q, k, v, g, beta, initial_state, documents)
    prepared = prepare(q, k, g, beta, documents, scale=scale)
    o, _, _, state = scan(
        prepared, v, state, scale=scale, gives="out", warpgroups=warpgroups(v.shape[3], heads)
    )
    return o[:, :tokens], jnp.swapaxes(state, 2, 3)


def forward(*arguments):
    return chunked(*arguments), arguments[:7]


def backward(scale, arguments, cotangents):
    *given, index = arguments
    documents = None if index is None else Documents(index, jnp.ones(index.shape, bool))

    def run(*given):
        *given, state = given
        return xla.gated_delta_rule(*given, scale=scale, initial_state=state, documents=documents)

    return *jax.vjp(run, *given)[1](cotangents), None


chunked.defvjp(forward, backward)
