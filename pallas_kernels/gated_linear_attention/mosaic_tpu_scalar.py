"""One chunk of the TPU kernel, with no decay or one a head: functions of arrays in VMEM.

The values of P heads lie side by side in [L, V]. gates, fp32 [P, 8, L], or [1, 8, L] for all heads:
rows COARSE and FINE are the cumulated log decay (`decay_sums.Sums`), INDEX the document of each
token, READ, WRITE and KEEP the decays between tokens and states, KEEP at each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

COARSE, FINE, INDEX, READ, WRITE, KEEP = range(6)
LATER, WRITES, KEPT = range(3)  # rows of the gradient: arguments of `chunks.gate_gradient`
ROWS = 8  # sublanes of a register


def dot(a, b, over: tuple[int, int] = (1, 0)):
    """Product summed over one axis of each, in fp32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def row_sums(x):
    """Sums of the rows of fp32 x [L, V], laid out as one row: [ROWS, L], all rows the same."""
    return dot(jnp.ones((ROWS, x.shape[1]), jnp.float32), x, (1, 1))


def scaled(x, factor):
    """x times an fp32 factor, in the dtype of x."""
    return (x.astype(jnp.float32) * factor).astype(x.dtype)


def places(size: int):
    """Row and column number of each entry of [L, L]."""
    shape = (size, size)
    return (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


class Decays(NamedTuple):
    """As in `xla.Chunked`; pair: of each head."""

    pair: list[Float[Array, "L L"]]
    read: Float[Array, "L V"]
    write: Float[Array, "L V"]
    keep: Float[Array, "1 V"]


def decays(gates: Float[Array, "P 8 L"], features: int) -> Decays:
    """The decays of a chunk, between tokens and between them and states of V features."""
    heads = [_decays(gates[head]) for head in range(gates.shape[0])]
    pair, *others = zip(*heads, strict=True)
    return Decays(list(pair), *(_by_head(x, features) for x in others))


def _decays(gates: Float[Array, "8 L"]):
    columns = gates.T
    column = lambda name: columns[:, name : name + 1]  # noqa: E731
    row = lambda name: gates[name : name + 1, :]  # noqa: E731
    i, j = places(gates.shape[1])
    exponent = (column(COARSE) - row(COARSE)) + (column(FINE) - row(FINE))
    seen = (j <= i) & (column(INDEX) == row(INDEX))
    pair = jnp.exp(jnp.where(seen, exponent, -jnp.inf))
    return pair, column(READ), column(WRITE), gates[KEEP : KEEP + 1, :1]


def _head_of(shape: tuple[int, int], heads: int):
    """The head that each entry belongs to, by its last axis."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) // (shape[1] // heads)


def _by_head(parts, features: int):
    """[rows, V] with the columns of each head from its own part, [rows, 1] or [rows, V]."""
    shape = (parts[0].shape[0], features)
    head, whole = _head_of(shape, len(parts)), jnp.broadcast_to(parts[0], shape)
    for number, part in enumerate(parts[1:], 1):
        whole = jnp.where(head == number, part, whole)
    return whole


def _of_head(x, number: int, heads: int):
    """x [rows, V] with zeros in the columns of other heads."""
    return x if heads == 1 else jnp.where(_head_of(x.shape, heads) == number, x, jnp.zeros_like(x))


def advance(k, v, gates, state):
    """The fp32 state [K, V] after the chunk."""
    d = decays(gates, v.shape[1])
    return d.keep * state + dot(k, scaled(v, d.write), (0, 0))


def attend(q, k, v, gates, state, scale: float):
    """Outputs of the chunk in fp32, from the fp32 state before it; and the state after it."""
    d = decays(gates, v.shape[1])
    scores = dot(q, k, (1, 1))
    pairs = [dot((scores * pair).astype(v.dtype), v) for pair in d.pair]
    o = _by_head(pairs, v.shape[1]) + d.read * dot(q, state.astype(q.dtype))
    return scale * o, d.keep * state + dot(k, scaled(v, d.write), (0, 0))


def gradients(q, k, v, gates, d_o, state, d_state, scale: float, with_gates: bool):
    """fp32 gradients of q, k, v, of the state before the chunk, and of gates [P, 8, L] (LATER ...).

    state: before the chunk, in the dtype of q; d_state: fp32, of the state after it.
    """
    d, dtype, heads = decays(gates, v.shape[1]), q.dtype, gates.shape[0]
    d_o = scale * d_o.astype(jnp.float32)
    narrow, d_read, d_after = d_o.astype(dtype), d.read * d_o, d_state.astype(dtype)
    scores = dot(q, k, (1, 1))
    d_weights = [
        pair * dot(narrow, _of_head(v, head, heads), (1, 1)) for head, pair in enumerate(d.pair)
    ]
    d_scores = sum(d_weights).astype(dtype)
    d_q = dot(d_scores, k) + dot(d_read.astype(dtype), state, (1, 1))
    d_k = dot(d_scores, q, (0, 0)) + dot(scaled(v, d.write), d_after, (1, 1))
    d_v_state = d.write * dot(k, d_after)
    pairs = [dot((scores * pair).astype(dtype), narrow, (0, 0)) for pair in d.pair]
    d_v = _by_head(pairs, v.shape[1]) + d_v_state
    d_before = d.keep * d_state + dot(q, d_read.astype(dtype), (0, 0))
    if not with_gates:
        return d_q, d_k, d_v, d_before

    i, j = places(q.shape[0])
    reads = d_read * dot(q, state)
    writes = v.astype(jnp.float32) * d_v_state
    kept = d.keep * state.astype(jnp.float32) * d_after.astype(jnp.float32)
    kept = jnp.sum(kept, axis=0, keepdims=True)
    d_gates = []
    for head in range(heads):
        passed = jnp.where(j < i, scores * d_weights[head], 0.0)
        later = row_sums(passed) - jnp.sum(passed, axis=0, keepdims=True)
        later += row_sums(_of_head(reads, head, heads))
        row = jax.lax.broadcasted_iota(jnp.int32, later.shape, 0)
        others = jnp.where(
            row == WRITES,
            row_sums(_of_head(writes, head, heads)),
            jnp.sum(_of_head(kept, head, heads), axis=1, keepdims=True),
        )
        d_gates.append(jnp.where(row == LATER, later, others))
    return d_q, d_k, d_v, d_before, jnp.stack(d_gates)
