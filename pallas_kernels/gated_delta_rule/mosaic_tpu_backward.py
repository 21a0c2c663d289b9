"""The gradients of the gated delta rule by a TPU kernel that visits chunks in reverse."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta_rule.mosaic_tpu_chunk import (
    KINDS,
    Sizes,
    advance,
    constants,
    read,
    row,
)


def gradients(inputs: dict, sizes: Sizes) -> dict:
    """Gradients of q, k, v, rows, G, coarse and the initial state, by the names of the inputs.

    inputs: those of the forward kernel, with the `states` before all chunks instead of `state`, and
    the cotangents `d_o` and `d_state` (of the final state).
    """
    outputs = {name: (KINDS[name], inputs[name].dtype) for name in ("q", "k", "v", "rows")}
    if sizes.decay == "vector":
        outputs["G"] = ("features", jnp.float32)
    outputs["state"] = ("state", jnp.float32)
    kernel = functools.partial(_kernel, sizes)
    result = sizes.call(kernel, inputs, KINDS, outputs, reverse=True)
    if sizes.decay == "vector":  # of rounded numbers
        result["coarse"] = jnp.zeros_like(inputs["coarse"])
    return result


def _kernel(sizes: Sizes, inputs: dict, outputs: dict, d_state):
    """The vector-Jacobian product of one chunk of some heads, from its inputs and states."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        d_state[...] = inputs["d_state"][0]

    heads = range(sizes.heads)
    given = constants(sizes, inputs)
    tokens = read(sizes, inputs)
    states = [inputs["states"][0, 0, head].astype(jnp.float32) for head in heads]
    d_o = [
        inputs["d_o"][0, :, head * sizes.V : (head + 1) * sizes.V].astype(jnp.float32)
        for head in heads
    ]
    _, pull = jax.vjp(lambda tokens, states: advance(sizes, tokens, states, given), tokens, states)
    d_tokens, d_states = pull(([d_state[head] for head in heads], d_o))
    widths = {"q": sizes.K, "k": sizes.K, "v": sizes.V}
    if sizes.decay == "vector":
        widths["G"] = sizes.K
    for name, width in widths.items():
        for head, value in enumerate(d_tokens[name]):
            place = slice(head * width, (head + 1) * width)
            outputs[name][0, :, place] = value.astype(outputs[name].dtype)
    for head in heads:
        d_state[head] = d_states[head]
        outputs["rows"][0, 0, head] = jnp.zeros_like(outputs["rows"][0, 0, head])
        row(outputs["rows"], head, "beta")[...] = d_tokens["beta"][head]
        if sizes.decay == "scalar":
            row(outputs["rows"], head, "G")[...] = d_tokens["G"][head]

    @pl.when(step == sizes.n - 1)
    def _():
        outputs["state"][0] = d_state[...]
