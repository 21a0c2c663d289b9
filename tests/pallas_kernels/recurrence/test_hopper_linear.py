"""The gradients of linear attention on Hopper: its passes, written down in jnp, give them."""

import jax
import jax.numpy as jnp
import pytest
from hopper_passes import (
    DECAYS,
    EIGHT_PIECES,
    MANY_CHUNKS,
    by_chunk,
    by_token,
    decays,
    found,
    product,
    rounded,
    summed_and_gates,
)
from recurrence_cases import HOPPER_CASES

from pallas_kernels._hopper import linear, rule
from pallas_kernels.gated_linear_attention import mosaic_gpu, ref

CASES = {
    **{name: HOPPER_CASES[name] for name in ("packed", "no_decay")},
    "one_piece": MANY_CHUNKS,
    "eight_pieces": EIGHT_PIECES,
}


def prepare(q, k, g, beta, documents, *, scale, pieces=1):
    """Summed log decays and gates; for scores what `attend` makes them of."""
    B, N, _ = g.shape
    summed, gates = summed_and_gates(g, documents)
    documents = None if documents is None else documents.reshape(B * pieces, -1)

    def in_pieces(x):
        x = jnp.moveaxis(x.reshape(B, N, pieces, -1, *x.shape[3:]), 2, 1)
        return x.reshape(B * pieces, *x.shape[2:])

    by_piece = summed.reshape(B, N, gates.shape[2], -1)
    scores = in_pieces(by_piece).reshape(B * pieces, N, -1), documents
    return summed, in_pieces(gates), scores, None


def scan(q, k, v, gates, scores, inverse, state, *, scale, gives, warpgroups):
    summed, documents = scores or (None, None)
    given = summed, gates, documents, q, k, v, None, state, None
    out, last = attend(*given, scale=scale, backwards=False, warpgroups=warpgroups)
    return out, None, None, last


def attend(
    summed, gates, documents, queries, keys, values, dotted, first, states,
    *, scale, backwards, warpgroups,
):  # fmt: skip
    """As `linear.attend`, with the roundings of the kernel."""
    dtype, N = keys.dtype, first.shape[1]
    tokens = [None if x is None else by_chunk(x, N) for x in (queries, keys, values, dotted)]
    decay = None if queries is None else decays(summed, documents)
    if states is not None:
        states = jnp.moveaxis(jnp.repeat(states, linear.EVERY, axis=2), 2, 0)
        states = states[: gates.shape[2]]

    def step(state, chunk):
        (queries, keys, values, dotted), gates, decay, before_state = chunk
        before, after = gates[:, :, 0, :, None], gates[:, :, 1, :, None]
        read, write = (after, before * scale) if backwards else (before * scale, after)
        stored = product("bnjv,bnjk->bnvk", rounded(values * write, dtype), keys)
        new = gates[:, :, 0, -1, None, None] * state + stored
        if queries is None:
            return new, None
        i, j = (keys, queries) if backwards else (queries, keys)
        scores = rounded(product("bnik,bnjk->bnij", i, j) * decay * scale, dtype)
        inter = product("bnvk,bnik->bniv", rounded(state, dtype), queries) * read
        within = "bnij,bniv->bnjv" if backwards else "bnij,bnjv->bniv"
        out = inter + product(within, scores, values)
        if dotted is None:
            return new, (out,)
        dots = jnp.sum(out * dotted, axis=3)[:, :, None]
        if not backwards:
            return new, (out, dots, state.astype(dtype))
        overlap = jnp.sum(new * before_state.astype(jnp.float32), axis=3)
        return new, (out, dots, jnp.sum(inter * dotted, axis=2), overlap)

    given = tokens, jnp.moveaxis(gates, 2, 0), decay, states
    last, results = jax.lax.scan(step, first, given, reverse=backwards)
    if queries is None:
        return None, last
    out, *more = results
    out = by_token(out, dtype)
    if dotted is None:
        return out, last
    dots, *more = (jnp.moveaxis(x, 0, 2) for x in more)
    more[-1] = more[-1][:, :, :: linear.EVERY]
    return out, last, jnp.moveaxis(dots, 2, 3).reshape(*dots.shape[:2], 1, -1), *more


@pytest.fixture
def written_down(monkeypatch):
    monkeypatch.setattr(rule, "prepare", prepare)
    monkeypatch.setattr(rule, "scan", scan)
    monkeypatch.setattr(linear, "attend", attend)


@pytest.mark.parametrize(
    "name, decays",
    [(name, "as_is") for name in CASES] + [("one_piece", decays) for decays in DECAYS],
)
def test_passes_give_the_gradients(written_down, name, decays):
    reference, function = ref.gated_linear_attention, mosaic_gpu.gated_linear_attention
    of = found("gated_linear_attention", reference, function, CASES, name, decays)
    assert max(of.values()) < 5e-3
