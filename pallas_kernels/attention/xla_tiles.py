"""The form of `xla` for long sequences: a scan over tiles of queries and keys."""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.attention import schedule, tile
from pallas_kernels.attention.mask import allowed
from pallas_kernels.attention.tile import STACKED


def forward(options, q, k, v, sinks, mask):
    """out like q [B, T, K, G, H], and for `backward` the fp32 log-sum-exp [B, K, G, T]."""
    T, S = q.shape[1], k.shape[1]
    size_q, size_k = options.chunks
    queries, keys, values = _stack_q(q, size_q), _stack_k(k, size_k), _stack_k(v, size_k)
    fits = _Fits(mask, T, S, size_q, size_k)
    rows, H = queries.shape[1:-1], queries.shape[-1]

    def visit(carry, place):
        state, out, lse = carry
        row, column, first = place
        state = jax.tree.map(
            lambda fresh, old: jnp.where(first, fresh, old), tile.start(rows, H), state
        )
        state = tile.step(
            state, queries[row], keys[column], values[column], fits(row, column), options, STACKED
        )
        out_part, lse_part = tile.finish(state, sinks)
        # A row is overwritten until its last tile: no branch, and it costs little beside the step.
        out = jax.lax.dynamic_update_index_in_dim(out, out_part.astype(q.dtype), row, 0)
        lse = jax.lax.dynamic_update_index_in_dim(lse, lse_part, row, 0)
        return (state, out, lse), None

    _, empty = tile.finish(tile.start(rows, H), sinks)  # of rows that no tile visits
    lse = jnp.broadcast_to(empty, queries.shape[:-1])
    carry = (tile.start(rows, H), jnp.zeros_like(queries), lse)
    places = _places(mask, T, S, size_q, size_k)
    (_, out, lse), _ = jax.lax.scan(visit, carry, places)
    return _unstack_q(out, T), _unstack_rows(lse, T)


def log_sum_exp(saved):
    """fp32 [B, K, G, T], +inf where no key was allowed."""
    return saved


def backward(options, q, k, v, sinks, mask, lse, delta, d_out):
    """fp32 gradients of q, k, v and sinks. delta: from `tile.delta`."""
    T, S = q.shape[1], k.shape[1]
    size_q, size_k = options.chunks
    queries, keys, values = _stack_q(q, size_q), _stack_k(k, size_k), _stack_k(v, size_k)
    d_outs = _stack_q(d_out, size_q)
    lses, deltas = _stack_rows(lse, size_q, jnp.inf), _stack_rows(delta, size_q, 0.0)
    fits = _Fits(mask, T, S, size_q, size_k)

    def visit(carry, place):
        dq, dk, dv = carry
        row, column, _ = place
        weights, scores = tile.normalized(
            queries[row], keys[column], lses[row], fits(row, column), options, STACKED
        )
        parts = tile.gradients(
            queries[row], keys[column], values[column], d_outs[row],
            weights, scores, deltas[row], options, STACKED,
        )  # fmt: skip
        carry = (
            _add(array, part, index)
            for array, part, index in zip((dq, dk, dv), parts, (row, column, column), strict=True)
        )
        return tuple(carry), None

    zeros = tuple(jnp.zeros_like(array, jnp.float32) for array in (queries, keys, values))
    (dq, dk, dv), _ = jax.lax.scan(visit, zeros, _places(mask, T, S, size_q, size_k))
    d_sinks = tile.sink_gradient(sinks, lse, delta)
    return _unstack_q(dq, T), _unstack_k(dk, S), _unstack_k(dv, S), d_sinks


def _places(mask, T, S, size_q, size_k):
    """Rows, columns and first-of-row flags of the tiles to visit."""
    visits = jnp.asarray(schedule.visits(mask, T, S, size_q, size_k))
    return visits[:, 0], visits[:, 1], visits[:, 2] == 1


class _Fits:
    """The mask by tile: fits(row, column) is bool [b, 1, 1, t, s], or None without need of one."""

    def __init__(self, mask, T, S, size_q, size_k):
        whole = T % size_q == 0 and S % size_k == 0
        self.always = whole and schedule.tile_state(mask, range(T), range(S)) == schedule.FULL
        mask = mask.with_indices(T, S)
        # Keys beyond S count as empty slots; queries beyond T see none, as their segment is 0.
        self.mask = mask.slice(
            lambda a: _stack_tokens(a, size_q, 0), lambda a: _stack_tokens(a, size_k, -1)
        )

    def __call__(self, row, column):
        if self.always:
            return None
        part = self.mask.slice(lambda a: a[row], lambda a: a[column])
        return allowed(part, part.query_index, part.key_index)[:, None, None]


def _add(array, part, index):
    old = jax.lax.dynamic_index_in_dim(array, index, 0, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(array, old + part, index, 0)


def _split(array, axis: int, size: int, fill=0):
    """Pad `axis` to a multiple of `size` and split it in (chunks, size); chunks go to the front."""
    chunks = math.ceil(array.shape[axis] / size)
    missing = chunks * size - array.shape[axis]
    if missing:
        widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
        array = jnp.pad(array, widths, constant_values=fill)
    shape = (*array.shape[:axis], chunks, size, *array.shape[axis + 1 :])
    return jnp.moveaxis(array.reshape(shape), axis, 0)


def _stack_q(array, size):
    """[B, T, K, G, H] -> [chunks, B, K, G, size, H]."""
    return jnp.moveaxis(_split(array, 1, size), 2, 4)


def _unstack_q(array, T):
    chunks, B, K, G, size, H = array.shape
    return array.transpose(1, 0, 4, 2, 3, 5).reshape(B, chunks * size, K, G, H)[:, :T]


def _stack_k(array, size):
    """[B, S, K, H] -> [chunks, B, K, size, H]."""
    return jnp.moveaxis(_split(array, 1, size), 2, 3)


def _unstack_k(array, S):
    chunks, B, K, size, H = array.shape
    return array.transpose(1, 0, 3, 2, 4).reshape(B, chunks * size, K, H)[:, :S]


def _stack_rows(array, size, fill):
    """[B, K, G, T] -> [chunks, B, K, G, size]."""
    return _split(array, 3, size, fill)


def _unstack_rows(array, T):
    chunks, B, K, G, size = array.shape
    return array.transpose(1, 2, 3, 0, 4).reshape(B, K, G, chunks * size)[..., :T]


def _stack_tokens(array, size, fill):
    """[b, T] -> [chunks, b, size]."""
    return _split(array, 1, size, fill)
