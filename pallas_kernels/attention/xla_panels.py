"""The form of `xla` for short sequences: a few panels of queries, each against one key range."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import schedule, tile
from pallas_kernels.attention.mask import allowed
from pallas_kernels.attention.tile import STORED


def forward(options, q, k, v, sinks, mask):
    """out like q [B, T, K, G, H], and for `backward` (log-sum-exp, weights) of each panel.

    The weights are kept in the dtype of the values: for short sequences that is cheaper than to
    compute them again.
    """
    B, T, K, G, H = q.shape
    q = jnp.moveaxis(q, 1, 3)
    outs, saved = [], []
    for queries, keys in schedule.panels(mask, T, k.shape[1], options.chunks[0]):
        if keys:
            fits = _allowed(mask, queries, keys)
            parts = _rows(q, queries, 3), _rows(k, keys), _rows(v, keys)
            out, lse, weights = tile.softmax(*parts, fits, sinks, options, STORED)
        else:
            out, lse = tile.finish(tile.start((B, K, G, len(queries)), H), sinks)
            weights = None
        outs.append(out.astype(q.dtype))
        saved.append((lse, weights))
    return jnp.moveaxis(_concatenate(outs, 3), 3, 1), saved


def log_sum_exp(saved):
    """fp32 [B, K, G, T], +inf where no key was allowed."""
    return _concatenate([lse for lse, _ in saved], 3)


def backward(options, q, k, v, sinks, mask, saved, delta, d_out):
    """fp32 gradients of q, k, v and sinks. delta: from `tile.delta`."""
    T, S = q.shape[1], k.shape[1]
    dq, dk, dv = [], [], []
    q, d_out = jnp.moveaxis(q, 1, 3), jnp.moveaxis(d_out, 1, 3)
    panels = schedule.panels(mask, T, S, options.chunks[0])
    for (queries, keys), (lse, weights) in zip(panels, saved, strict=True):
        if not keys:
            dq.append(jnp.zeros_like(_rows(q, queries, 3), jnp.float32))
            continue
        parts = _rows(q, queries, 3), _rows(k, keys), _rows(v, keys)
        scores = None
        if options.soft_cap is not None:
            fits = _allowed(mask, queries, keys)
            weights, scores = tile.normalized(*parts[:2], lse, fits, options, STORED)
        dq_part, dk_part, dv_part = tile.gradients(
            *parts, _rows(d_out, queries, 3), weights, scores,
            delta[..., queries.start : queries.stop], options, STORED,
        )  # fmt: skip
        dq.append(dq_part)
        dk.append(_pad_rows(dk_part, keys.start, S - keys.stop))
        dv.append(_pad_rows(dv_part, keys.start, S - keys.stop))
    nothing = jnp.zeros_like(k, jnp.float32)
    d_sinks = tile.sink_gradient(sinks, log_sum_exp(saved), delta)
    return jnp.moveaxis(_concatenate(dq, 3), 3, 1), _sum(dk, nothing), _sum(dv, nothing), d_sinks


def _rows(array, span: range, axis: int = 1):
    """Rows `span` of an array, the array itself where these are all."""
    if len(span) == array.shape[axis]:
        return array
    return jax.lax.slice_in_dim(array, span.start, span.stop, axis=axis)


def _pad_rows(array, before: int, after: int):
    if before == after == 0:
        return array
    none = (0, 0, 0)
    return jax.lax.pad(array, np.float32(0), [none, (before, after, 0), none, none])


def _concatenate(parts, axis):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _sum(parts, nothing):
    return sum(parts[1:], parts[0]) if parts else nothing


def _allowed(mask, queries: range, keys: range):
    """Bool [b, 1, 1, t, s] of a panel, None where every pair is allowed."""
    if schedule.tile_state(mask, queries, keys) == schedule.FULL:
        return None
    part = mask.slice(lambda a: _rows(a, queries), lambda a: _rows(a, keys))
    query_index, key_index = part.query_index, part.key_index
    if query_index is None:
        query_index = jnp.asarray(np.arange(queries.start, queries.stop, dtype=np.int32)[None])
    if key_index is None:
        key_index = jnp.asarray(np.arange(keys.start, keys.stop, dtype=np.int32)[None])
    return allowed(part, query_index, key_index)[:, None, None]
