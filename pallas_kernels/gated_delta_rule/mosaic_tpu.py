"""The gated delta rule by a TPU kernel that keeps the state in VMEM from chunk to chunk."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels._core.decay_sums import sums
from pallas_kernels._core.recurrence import Documents, decay_kind
from pallas_kernels.gated_delta_rule import chunk
from pallas_kernels.gated_delta_rule import mosaic_tpu_backward as backward
from pallas_kernels.gated_delta_rule.mosaic_tpu_chunk import (
    KINDS,
    ROWS,
    Sizes,
    advance,
    constants,
    read,
)

CHUNK = 64  # tokens
LANES = 128  # of a vector register; features are padded to multiples
STATE = 2**16  # numbers in the states of a step: 4 heads of 128 x 128, to fill the units of a core


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
    interpret=False,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """`ref.gated_delta_rule` on a TPU; numerics and memory as of the chunks in `xla`.

    interpret: run the kernels in Python on any device, for tests.
    """
    B, T, H, K = q.shape
    N, V = v.shape[2:]
    g, beta = chunk.gates(g, beta, documents)
    padded_K, padded_V = _round_up(K, LANES), _round_up(V, LANES)
    sizes = Sizes(
        B, _round_up(T, CHUNK), H, N, padded_K, padded_V, CHUNK,
        _key_heads(H, N // H * padded_K * padded_V), decay_kind(g), documents is not None,
        q.dtype.name, float(scale), interpret,
    )  # fmt: skip

    def flat(x, features):  # [B, T, heads, features] -> [B, padded T, heads * padded features]
        widths = ((0, 0), (0, sizes.T - T), (0, 0), (0, features - x.shape[3]))
        return jnp.pad(x, widths).reshape(B, sizes.T, -1)

    def by_chunk(x):  # [B, T, N] -> [B, n, N, C]
        x = jnp.pad(x, ((0, 0), (0, sizes.T - T), (0, 0)))
        return x.reshape(B, sizes.n, CHUNK, N).swapaxes(2, 3)

    rows = {"beta": by_chunk(beta)}
    if sizes.decay == "scalar":
        rows["coarse"], rows["G"] = sums(by_chunk(g), axis=3)
    if documents is not None:
        started = chunk.documents_started(documents.index, CHUNK)
        rows["documents"] = jnp.broadcast_to(started[:, :, None], rows["beta"].shape)
    zeros = jnp.zeros_like(rows["beta"])
    inputs = {
        "q": flat(q, sizes.K),
        "k": flat(k, sizes.K),
        "v": flat(v, sizes.V),
        "rows": jnp.stack([rows.get(name, zeros) for name in ROWS], axis=3),
    }
    if sizes.decay == "vector":
        inputs["g"] = flat(g, sizes.K)
    inputs["state"] = jnp.zeros((B, N, sizes.K, sizes.V), jnp.float32)
    if initial_state is not None:
        inputs["state"] = jnp.pad(
            initial_state.astype(jnp.float32),
            ((0, 0), (0, 0), (0, sizes.K - K), (0, sizes.V - V)),
        )
    o, state = _rule(inputs, sizes)
    return o.reshape(B, sizes.T, N, sizes.V)[:, :T, :, :V], state[:, :, :K, :V]


def _cumulated(inputs: dict, sizes: Sizes) -> dict:
    """With the sums of a vector decay `g` in its place, which take more memory than it."""
    if "g" not in inputs:
        return inputs
    parts = sums(inputs["g"].reshape(sizes.B, sizes.n, CHUNK, -1), axis=2)
    coarse, G = (x.reshape(inputs["g"].shape) for x in parts)
    others = {name: x for name, x in inputs.items() if name != "g"}
    return others | {"coarse": coarse, "G": G}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _rule(inputs: dict, sizes: Sizes):
    """(o [B, T, N V], final state) of the padded inputs."""
    inputs = _cumulated(inputs, sizes)
    outputs = {"o": ("values", inputs["v"].dtype), "state": ("state", jnp.float32)}
    result = sizes.call(functools.partial(_kernel, sizes), inputs, KINDS, outputs)
    return result["o"], result["state"]


def _rule_forward(inputs, sizes):
    return _rule(inputs, sizes), inputs


def _rule_backward(sizes, inputs, cotangents):
    """The forward kernel again for the states before all chunks, then the chunks in reverse."""
    inputs, pull = jax.vjp(lambda inputs: _cumulated(inputs, sizes), inputs)
    outputs = {"states": ("states", jnp.dtype(sizes.dtype))}
    states = sizes.call(functools.partial(_kernel, sizes), inputs, KINDS, outputs)["states"]
    d_o, d_state = cotangents
    inputs = {name: x for name, x in inputs.items() if name != "state"}
    inputs |= {"states": states, "d_o": d_o, "d_state": d_state}
    return pull(backward.gradients(inputs, sizes))


_rule.defvjp(_rule_forward, _rule_backward)


def _kernel(sizes: Sizes, inputs: dict, outputs: dict, state):
    """One chunk of some heads; writes o and the final state, or the state before each chunk."""
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        state[...] = inputs["state"][0]

    before = [state[head] for head in range(sizes.heads)]
    after, o = advance(sizes, read(sizes, inputs), before, constants(sizes, inputs))
    for head in range(sizes.heads):
        state[head] = after[head]
        if "states" in outputs:
            outputs["states"][0, 0, head] = before[head].astype(outputs["states"].dtype)
        else:
            place = slice(head * sizes.V, (head + 1) * sizes.V)
            outputs["o"][0, :, place] = o[head].astype(outputs["o"].dtype)

    if "state" in outputs:

        @pl.when(step == sizes.n - 1)
        def _():
            outputs["state"][0] = state[...]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _key_heads(H: int, state: int) -> int:
    """Key heads of a step, with `state` numbers in the states of each: as many as make STATE."""
    return next(group for group in range(max(1, STATE // state), 0, -1) if H % group == 0)
