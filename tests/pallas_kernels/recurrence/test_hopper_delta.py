"""The gradients of the delta rule on Hopper: its passes, written down in jnp, give them."""

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
from recurrence_cases import HOPPER_CASES, Case

from pallas_kernels._hopper import delta, rule
from pallas_kernels._hopper.tiles import CHUNK
from pallas_kernels.gated_delta_rule import mosaic_gpu, ref

CASES = {
    **{name: HOPPER_CASES[name] for name in ("one_token", "packed", "no_decay")},
    "many_chunks": MANY_CHUNKS,
    "eight_pieces": EIGHT_PIECES,
    "equal_keys": Case(
        T=150, K=64, V=64, cosine=0.9, beta=0.95, initial_state=True, dtype="bfloat16"
    ),
}


def prepare(q, k, g, beta, documents, *, scale, pieces=1):
    N, dtype = g.shape[1], q.dtype
    summed, gates = summed_and_gates(g, documents)
    decay, q, k = decays(summed, documents), by_chunk(q, N), by_chunk(k, N)
    scores = product("cbnik,cbnjk->cbnij", q, k) * decay * scale
    weight = by_chunk(beta)
    lower = jnp.tril(product("cbnik,cbnjk->cbnij", k, k) * decay * weight[..., None], -1)
    whole = jnp.eye(CHUNK)[None, None, None] + lower
    inverse = jax.scipy.linalg.solve_triangular(
        whole, jnp.broadcast_to(jnp.eye(CHUNK), whole.shape), lower=True
    )
    scores, inverse = (
        jnp.moveaxis(x.astype(dtype), 0, 2) for x in (scores, inverse * weight[..., None, :])
    )
    return summed, gates, scores, inverse


def scan(q, k, v, gates, scores, inverse, state, *, scale, gives, warpgroups, pieces=1):
    dtype, N = q.dtype, v.shape[2]
    chunks = gates.shape[2]

    def step(state, chunk):
        q, k, v, gates, scores, inverse = chunk
        before, after = gates[:, :, 0, :, None], gates[:, :, 1, :, None]
        low = rounded(state, dtype)
        error = v - before * product("bnvk,bnik->bniv", low, k)
        value = product("bnij,bnjv->bniv", inverse, rounded(error, dtype))
        inter = product("bnvk,bnik->bniv", low, q) * before * scale
        low_value = rounded(value, dtype)
        o = inter + product("bnij,bnjv->bniv", scores, low_value)
        new = gates[:, :, 0, -1, None, None] * state
        new = new + product("bnjv,bnjk->bnvk", rounded(value * after, dtype), k)
        return new, (o, low_value, state)

    given = [by_chunk(x, N) for x in (q, k, v)]
    given += [jnp.moveaxis(x, 2, 0) for x in (gates, scores, inverse)]
    last, (o, values, states) = jax.lax.scan(step, state, given)
    states = jnp.moveaxis(states[:: chunks // pieces], 0, 2) if pieces > 1 else None
    left = (by_token(values, dtype), states) if gives == "residuals" else (None, None)
    return by_token(o, dtype), *left, last


def reverse(q, k, d_out, gates, scores, inverse, d_final, *, scale, warpgroups, pieces):
    dtype, N = q.dtype, d_out.shape[2]
    length = gates.shape[2] // pieces

    def step(d_state, chunk):
        q, k, d_out, gates, scores, inverse = chunk
        before, after = gates[:, :, 0, :, None], gates[:, :, 1, :, None]
        stored = product("bnvk,bnjk->bnjv", rounded(d_state, dtype), k) * after
        written = stored + product("bnij,bniv->bnjv", scores, d_out)
        d_v = product("bnij,bniv->bnjv", inverse, rounded(written, dtype))
        new = gates[:, :, 0, -1, None, None] * d_state
        new = new + product("bniv,bnik->bnvk", rounded(d_out * before * scale, dtype), q)
        new = new - product("bniv,bnik->bnvk", rounded(d_v * before, dtype), k)
        return new, (d_v, d_state)

    given = [by_chunk(x, N) for x in (q, k, d_out)]
    given += [jnp.moveaxis(x, 2, 0) for x in (gates, scores, inverse)]
    last, (d_v, d_states) = jax.lax.scan(step, d_final, given, reverse=True)
    d_states = jnp.moveaxis(d_states[length - 1 :: length], 0, 2) if pieces > 1 else None
    return by_token(d_v, dtype), d_states, last


def attend(
    q, k, values, d_out, d_v, summed, gates, documents, beta, d_k, states, first,
    *, scale, backwards, warpgroups, pieces,
):  # fmt: skip
    """As `delta.attend`, with the roundings of the kernel."""
    dtype, (B, _, N, _), every = q.dtype, values.shape, delta.EVERY
    of_token = [by_chunk(x, N) for x in (q, k, values, d_out, d_v)]
    shown = product("cbniv,cbnjv->cbnij", of_token[3], of_token[2])
    replaced = product("cbniv,cbnjv->cbnij", of_token[4], of_token[2])
    decay = decays(summed, documents)
    strict = jnp.tril(jnp.ones((CHUNK, CHUNK)), -1)[None, None, None]
    squares = [rounded(x, dtype) for x in (shown * decay * scale, -replaced * decay * strict)]
    gates = jnp.moveaxis(gates, 2, 0)
    chunks = gates.shape[0]

    def step(state, chunk):
        (q, k, values, d_out, d_v), (shown, replaced), gates, extra = chunk
        before, after = gates[:, :, 0, :, None], gates[:, :, 1, :, None]
        whole, low = gates[:, :, 0, -1, None, None], rounded(state, dtype)
        if not backwards:
            d_q = product("bnkv,bniv->bnik", low, d_out) * before * scale
            d_q = d_q + product("bnij,bnjk->bnik", shown, k)
            d_k = product("bnkv,bniv->bnik", low, d_v) * -before
            d_k = d_k + product("bnij,bnjk->bnik", replaced, k)
            new = product("bnjk,bnjv->bnkv", rounded(k * after, dtype), values)
            return whole * state + new, (d_q, d_k, jnp.sum(q * d_q + k * d_k, axis=3), low)
        inter = product("bnkv,bnjv->bnjk", low, values) * after
        d_k = inter + product("bnij,bnik->bnjk", shown, q)
        d_k = d_k + product("bnij,bnik->bnjk", replaced, k)
        new = product("bnik,bniv->bnkv", rounded(q * before * scale, dtype), d_out)
        new = new - product("bnik,bniv->bnkv", rounded(k * before, dtype), d_v)
        new = whole * state + new
        earlier, kept = extra
        overlap = jnp.sum(kept.astype(jnp.float32) * new, axis=3)
        return new, (d_k + earlier, jnp.sum(d_k * k, axis=3), jnp.sum(inter * k, axis=2), overlap)

    extra = None
    if backwards:
        kept = jnp.moveaxis(jnp.repeat(states, every, axis=2), 2, 0)[:chunks]
        extra = by_chunk(d_k, N), kept

    def of_pieces(x):
        return jnp.moveaxis(x.reshape(pieces, -1, *x.shape[1:]), 0, 1)

    given = jax.tree.map(of_pieces, (of_token, squares, gates, extra))
    first = jnp.moveaxis(first.reshape(B, pieces, *first.shape[1:]), 1, 0)
    run = jax.vmap(lambda s, x: jax.lax.scan(step, s, x, reverse=backwards)[1], (0, 1), 1)
    results = run(first, given)
    first_out, *more = (x.swapaxes(0, 1).reshape(chunks, *x.shape[2:]) for x in results)
    first_out = by_token(first_out, dtype)
    dots = jnp.moveaxis(more[0 if backwards else 1], 0, 2).reshape(B, N, 1, -1)
    if backwards:
        written, overlaps = (jnp.moveaxis(x, 0, 2) for x in more[1:])
        return first_out, dots, written, overlaps[:, :, ::every]
    states = jnp.moveaxis(more[2][::every], 0, 2).astype(dtype)
    diagonal = jnp.moveaxis(jnp.diagonal(replaced, axis1=3, axis2=4), 0, 2).reshape(beta.shape)
    return first_out, by_token(more[0], dtype), dots, states, diagonal / beta**2


@pytest.fixture
def written_down(monkeypatch):
    for name, function in (("prepare", prepare), ("scan", scan), ("reverse", reverse)):
        monkeypatch.setattr(rule, name, function)
    monkeypatch.setattr(delta, "attend", attend)


@pytest.mark.parametrize(
    "name, decays",
    [(name, "as_is") for name in CASES] + [("many_chunks", decays) for decays in DECAYS],
)
def test_passes_give_the_gradients(written_down, name, decays):
    of = found(
        "gated_delta_rule", ref.gated_delta_rule, mosaic_gpu.gated_delta_rule, CASES, name, decays
    )
    assert max(of.values()) < 1e-2
