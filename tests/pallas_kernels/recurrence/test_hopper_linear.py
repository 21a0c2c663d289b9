"""The gradients of linear attention on Hopper: its passes, written down in jnp, give them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from recurrence_cases import HOPPER_CASES, Case, errors, hopper_arguments

from pallas_kernels._core.recurrence import documents as documents_of
from pallas_kernels._hopper import linear, rule
from pallas_kernels._hopper.tiles import CHUNK
from pallas_kernels.gated_linear_attention import mosaic_gpu, ref

CASES = {
    **{name: HOPPER_CASES[name] for name in ("packed", "no_decay")},
    "one_piece": Case(B=2, T=630, H=1, N=2, K=64, V=64, initial_state=True, dtype="bfloat16"),
    "eight_pieces": Case(T=1000, H=1, N=1, K=64, V=64, initial_state=True, dtype="bfloat16"),
}
DECAYS = {
    "near_one": lambda g: 0.01 * g,
    "near_zero": lambda g: g - 4.0,
    "of_all_sizes": lambda g: -jnp.exp(40.0 * g + 2.0),
}


def in_chunks(x, heads: int):
    """[B, T, H, F] as fp32 [chunks, B, N, C, F]."""
    B, T, H, F = x.shape
    x = jnp.repeat(x.astype(jnp.float32), heads // H, axis=2)
    return jnp.moveaxis(x.reshape(B, T // CHUNK, CHUNK, heads, F), (1, 3), (0, 2))


def by_token(x):
    """[chunks, B, N, C, F] as [B, T, N, F]."""
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def prepare(q, k, g, beta, documents, *, scale, pieces=1):
    """Summed log decays and gates; for scores what `attend` makes them of."""
    B, N, T = g.shape
    summed = jnp.cumsum(g.reshape(B, N, -1, CHUNK), axis=3)
    before, after = jnp.exp(summed), jnp.exp(summed[..., -1:] - summed)
    if documents is not None:
        own = documents.reshape(B, 1, -1, CHUNK)
        last = jnp.pad(own[:, :, :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0)))
        before = jnp.where(own == last, before, 0.0)
        after = jnp.where(own == own[..., -1:], after, 0.0)
        documents = documents.reshape(B * pieces, -1)

    def in_pieces(x):
        x = jnp.moveaxis(x.reshape(B, N, pieces, -1, *x.shape[3:]), 2, 1)
        return x.reshape(B * pieces, *x.shape[2:])

    gates = in_pieces(jnp.stack([before, after], axis=3))
    scores = in_pieces(summed).reshape(B * pieces, N, -1), documents
    return summed.reshape(B, N, T), gates, scores, None


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
    tokens = [None if x is None else in_chunks(x, N) for x in (queries, keys, values, dotted)]
    chunks = tokens[1].shape[0]
    if summed is not None:
        summed = jnp.moveaxis(summed.reshape(*summed.shape[:2], chunks, CHUNK), 2, 0)
    if documents is not None:
        documents = jnp.moveaxis(documents.reshape(-1, 1, chunks, CHUNK), 2, 0)
    if states is not None:
        states = jnp.moveaxis(jnp.repeat(states, linear.EVERY, axis=2), 2, 0)[:chunks]

    def rounded(x):
        return x.astype(dtype).astype(jnp.float32)

    def product(text, *arrays):
        return jnp.einsum(text, *arrays, precision="highest")

    def step(state, chunk):
        (queries, keys, values, dotted), gates, summed, documents, before_state = chunk
        before, after = gates[:, :, 0, :, None], gates[:, :, 1, :, None]
        read, write = (after, before * scale) if backwards else (before * scale, after)
        stored = product("bnjv,bnjk->bnvk", rounded(values * write), keys)
        new = gates[:, :, 0, -1, None, None] * state + stored
        if queries is None:
            return new, None
        keep = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))[None, None]
        if documents is not None:
            keep = keep & (documents[..., :, None] == documents[..., None, :])
        decay = jnp.exp(jnp.where(keep, summed[..., :, None] - summed[..., None, :], -jnp.inf))
        i, j = (keys, queries) if backwards else (queries, keys)
        scores = rounded(product("bnik,bnjk->bnij", i, j) * decay * scale)
        inter = product("bnvk,bnik->bniv", rounded(state), queries) * read
        within = "bnij,bniv->bnjv" if backwards else "bnij,bnjv->bniv"
        out = inter + product(within, scores, values)
        if dotted is None:
            return new, (out,)
        dots = jnp.sum(out * dotted, axis=3)[:, :, None]
        if not backwards:
            return new, (out, dots, state.astype(dtype))
        overlap = jnp.sum(new * before_state.astype(jnp.float32), axis=3)
        return new, (out, dots, jnp.sum(inter * dotted, axis=2), overlap)

    given = tokens, jnp.moveaxis(gates, 2, 0), summed, documents, states
    last, results = jax.lax.scan(step, first, given, reverse=backwards)
    if queries is None:
        return None, last
    out, *more = results
    out = by_token(out).astype(dtype)
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


def arguments_of(name: str) -> dict:
    if name in HOPPER_CASES:
        return hopper_arguments("gated_linear_attention", name)
    arguments = CASES[name].arguments()
    del arguments["beta"]
    return arguments


def found(name: str, decays: str) -> dict:
    """Errors against the recurrence, by what they are of."""
    case = CASES[name]
    arguments = arguments_of(name)
    if decays in DECAYS:
        arguments["g"] = DECAYS[decays](arguments["g"])
    index = None if case.segments is None else documents_of(case.segment_ids)

    def run(function, initial_state=None, **arguments):
        return function(
            **arguments, initial_state=initial_state, scale=case.K**-0.5, documents=index
        )

    return errors(
        functools.partial(run, ref.gated_linear_attention),
        functools.partial(run, mosaic_gpu.gated_linear_attention),
        arguments,
    )


@pytest.mark.parametrize(
    "name, decays",
    [(name, "as_is") for name in CASES] + [("one_piece", decays) for decays in DECAYS],
)
def test_passes_give_the_gradients(written_down, name, decays):
    of = found(name, decays)
    print(name, decays, {key: f"{value:.1e}" for key, value in of.items()})
    assert max(of.values()) < 5e-3
