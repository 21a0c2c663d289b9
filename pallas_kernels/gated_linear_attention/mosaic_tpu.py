"""Linear attention by Pallas TPU kernels: arguments as the kernels need them, and gradients."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels._core import decay_sums
from pallas_kernels._core.recurrence import Documents, decay_kind
from pallas_kernels.gated_linear_attention import chunks
from pallas_kernels.gated_linear_attention.mosaic_tpu_kernels import Kernels
from pallas_kernels.gated_linear_attention.mosaic_tpu_scalar import KEPT, LATER, ROWS, WRITES
from pallas_kernels.gated_linear_attention.support import TPU_CHUNK as CHUNK
from pallas_kernels.gated_linear_attention.support import TPU_LANES as LANES
from pallas_kernels.gated_linear_attention.support import tpu_heads_side_by_side


def gated_linear_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T N V"],
    g: Float[Array, "B T N *K"] | None,
    *,
    scale: float,
    initial_state: Float[Array, "B N K V"] | None,
    documents: Documents | None,
    interpret: bool | pltpu.InterpretParams = False,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """`xla.gated_linear_attention` on a TPU; outputs are rounded to the dtype of v in the kernel.

    interpret: run the kernels in Python on any device, for tests.
    """
    length, features, values = q.shape[1], q.shape[3], v.shape[3]
    if initial_state is None:
        initial_state = jnp.zeros((v.shape[0], v.shape[2], features, values), jnp.float32)
    k = chunks.without_padding(k, documents)
    if g is not None:
        g = _padded(g, {1: CHUNK} | ({3: LANES} if g.ndim == 4 else {}))
        if documents is not None:
            gate = jnp.moveaxis(chunks.masks(documents, CHUNK).gate, 0, 1)
            g = jnp.where(gate.reshape(*g.shape[:2], *[1] * (g.ndim - 2)), g, 0.0)
        g = jnp.maximum(g, decay_sums.FLOOR)
    heads = tpu_heads_side_by_side(v.shape[2] // q.shape[2], values, decay_kind(g))
    q, k = (_padded(x, {1: CHUNK, 3: LANES}) for x in (q, k))
    v = _padded(v, {1: CHUNK, 3: LANES // heads})
    state = _padded(initial_state.astype(jnp.float32), {2: LANES, 3: LANES // heads})
    o, final_state = _attend(q, k, v, g, state, documents, scale, interpret)
    return o[:, :length, :, :values], final_state[:, :, :features, :values]


def _padded(x, multiples: dict[int, int]):
    """Zeros after the end of some axes, up to a multiple."""
    return jnp.pad(x, [(0, -n % multiples.get(axis, 1)) for axis, n in enumerate(x.shape)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attend(q, k, v, g, state, documents, scale, interpret):
    """Sizes are multiples of CHUNK and LANES, and g is 0 where it is not used."""
    kernels, heads = _kernels(q, k, v, g, documents, scale, interpret)
    o, final_state = kernels.forward(_side_by_side(state, heads))
    return o.reshape(v.shape), _apart(final_state, heads)


def _kernels(q, k, v, g, documents, scale, interpret) -> tuple[Kernels, int]:
    """The kernels, and how many heads they do side by side."""
    decay, rows = decay_kind(g), _rows(g, documents, q.shape[1])
    gates = (_flat(g), rows) if decay == "vector" else (rows,)
    heads = max(1, LANES // v.shape[3])
    sizes = (*q.shape[:3], v.shape[2] // heads, q.shape[3], v.shape[3] * heads)
    return Kernels(sizes, _flat(q), _flat(k), _flat(v), gates, decay, scale, interpret), heads


def _side_by_side(state, heads: int):
    """[B, N, K, V] to [B, N / heads, K, heads V]."""
    B, N, K, V = state.shape
    state = state.reshape(B, N // heads, heads, K, V)
    return jnp.moveaxis(state, 2, 3).reshape(B, N // heads, K, heads * V)


def _apart(state, heads: int):
    """[B, N / heads, K, heads V] to [B, N, K, V]."""
    B, N, K, V = state.shape
    state = jnp.moveaxis(state.reshape(B, N, K, heads, V // heads), 3, 2)
    return state.reshape(B, N * heads, K, V // heads)


def _flat(x):
    """[B, T, heads, features] to [B, T, heads * features]."""
    return x.reshape(*x.shape[:2], -1)


def _forward(q, k, v, g, state, documents, scale, interpret):
    arguments = (q, k, v, g, state, documents)
    return _attend(*arguments, scale, interpret), arguments


def _backward(scale, interpret, arguments, cotangents):
    q, k, v, g, state, documents = arguments
    d_o, d_final = cotangents
    kernels, heads = _kernels(q, k, v, g, documents, scale, interpret)
    states = kernels.states(_side_by_side(state, heads))
    d_final = _side_by_side(d_final, heads)
    d_q, d_k, d_v, d_state, *d_g = kernels.backward(states, _flat(d_o), d_final)
    d_g = d_g[0] if d_g else None
    if kernels.decay == "scalar":
        pieces = d_g.reshape(*d_g.shape[:3], -1, CHUNK)  # [B, N, ROWS, M, CHUNK]
        kept = pieces[:, :, KEPT, :, 0]
        d_g = chunks.gate_gradient(pieces[:, :, LATER], pieces[:, :, WRITES], kept, axis=3)
        d_g = jnp.moveaxis(d_g.reshape(*d_g.shape[:2], -1), 1, 2)
    elif kernels.decay == "vector":
        d_g = d_g.reshape(g.shape)
    d_q, d_k, d_v = d_q.reshape(q.shape), d_k.reshape(k.shape), d_v.reshape(v.shape)
    return d_q, d_k, d_v, d_g, _apart(d_state, heads), None


_attend.defvjp(_forward, _backward)


def _rows(g, documents, length: int) -> Float[Array, "b n 8 T"]:
    """The rows of `mosaic_tpu_scalar`; b and n are 1 where they are the same for all."""
    mask = chunks.masks(documents, CHUNK)
    read, write, keep = (jnp.moveaxis(x, 0, 1)[:, None] for x in (mask.read, mask.write, mask.keep))
    keep = keep[..., None]  # as the others [b, 1, m, CHUNK]
    index = jnp.zeros((1, 1, 1, 1), jnp.float32)
    if documents is not None:
        index = jnp.pad(documents.index, ((0, 0), (0, length - documents.index.shape[1])), "edge")
        index = index.astype(jnp.float32).reshape(index.shape[0], 1, -1, CHUNK)
    if g is None or g.ndim == 4:
        none = jnp.zeros((1, 1, 1, 1), jnp.float32)
        rows = [none, none, index, *(x.astype(jnp.float32) for x in (read, write, keep))]
    else:
        sums = decay_sums.sums(jnp.moveaxis(g, 2, 1).reshape(*g.shape[::2], -1, CHUNK), axis=3)
        rows = [
            sums.coarse, sums.fine, index,
            chunks.masked_exp(sums.total(), read),
            chunks.masked_exp(sums[..., -1:] - sums, write),
            chunks.masked_exp(sums[..., -1:].total(), keep),
        ]  # fmt: skip
    leading = jnp.broadcast_shapes(*(row.shape[:2] for row in rows))
    rows = [jnp.broadcast_to(row, (*leading, length // CHUNK, CHUNK)) for row in rows]
    rows += [jnp.zeros_like(rows[0])] * (ROWS - len(rows))
    return jnp.stack(rows, axis=2).reshape(*leading, ROWS, length)
