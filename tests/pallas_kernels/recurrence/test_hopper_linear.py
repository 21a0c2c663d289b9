"""The gradients of linear attention on Hopper: its passes, written down in jnp, give them."""

import jax
import jax.numpy as jnp
import pytest
from recurrence_cases import HOPPER_CASES, Case, errors, hopper_arguments

from pallas_kernels._core.recurrence import documents as documents_of
from pallas_kernels._hopper import linear, rule
from pallas_kernels._hopper.tiles import CHUNK
from pallas_kernels.gated_linear_attention import mosaic_gpu, ref

CASES = {
    **{name: HOPPER_CASES[name] for name in ("packed", "no_decay", "two_tiles_a_processor")},
    "long": Case(T=1000, H=2, N=2, K=64, V=64, initial_state=True, dtype="bfloat16"),
    "eight_pieces": Case(T=1024, H=1, N=1, K=64, V=64, initial_state=True, dtype="bfloat16"),
}
SHIFTS = {"as_is": 0.0, "near_one": None, "near_zero": -4.0}


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
    """Of summed log decays and gates; scores are left to `attend`."""
    B, N, T = g.shape
    summed = jnp.cumsum(g.reshape(B, N, -1, CHUNK), axis=3)
    before, after = jnp.exp(summed), jnp.exp(summed[..., -1:] - summed)
    if documents is not None:
        own = documents.reshape(B, 1, -1, CHUNK)
        last = jnp.pad(own[:, :, :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0)))
        before = jnp.where(own == last, before, 0.0)
        after = jnp.where(own == own[..., -1:], after, 0.0)
    gates = jnp.stack([before, after], axis=3).reshape(B, N, pieces, -1, 2, CHUNK)
    gates = jnp.moveaxis(gates, 2, 1).reshape(B * pieces, N, -1, 2, CHUNK)
    kept[:] = [summed.reshape(B, N, T), documents, pieces]
    return summed.reshape(B, N, T), gates, None, None


kept = []  # what `scan` needs besides, which on the chip are the scores


def scan(q, k, v, gates, scores, inverse, state, *, scale, gives, warpgroups):
    summed, documents, pieces = kept
    B, N, T = summed.shape
    summed = jnp.moveaxis(summed.reshape(B, N, pieces, -1), 2, 1).reshape(B * pieces, N, -1)
    documents = None if documents is None else documents.reshape(B * pieces, -1)
    out, last, *_ = attend(
        summed, gates, documents, q, k, v, None, state, None, scale=scale, backwards=False,
        warpgroups=warpgroups,
    )  # fmt: skip
    return out, None, None, last


def attend(
    summed, gates, documents, queries, keys, values, dotted, first, states,
    *, scale, backwards, warpgroups,
):  # fmt: skip
    """As `linear.attend`, with the roundings of the kernel."""
    dtype, (B, N) = keys.dtype, first.shape[:2]
    chunks = keys.shape[1] // CHUNK
    out, kept, written, overlaps = [None] * chunks, [], [None] * chunks, []
    queries, keys, values, dotted = (
        None if x is None else in_chunks(x, N) for x in (queries, keys, values, dotted)
    )
    state = first

    def rounded(x):
        return x.astype(dtype).astype(jnp.float32)

    def product(text, *arrays):
        return jnp.einsum(text, *arrays, precision="highest")

    for c in reversed(range(chunks)) if backwards else range(chunks):
        before, after = gates[:, :, c, 0, :, None], gates[:, :, c, 1, :, None]
        read, write = (after, before * scale) if backwards else (before * scale, after)
        if queries is not None:
            if dotted is not None and not backwards and c % linear.EVERY == 0:
                kept.append(state.astype(dtype))
            i, j = (keys[c], queries[c]) if backwards else (queries[c], keys[c])
            total = summed[:, :, c * CHUNK : (c + 1) * CHUNK]
            keep = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))[None, None]
            if documents is not None:
                own = documents[:, None, c * CHUNK : (c + 1) * CHUNK]
                keep = keep & (own[..., :, None] == own[..., None, :])
            decay = jnp.exp(jnp.where(keep, total[..., :, None] - total[..., None, :], -jnp.inf))
            scores = rounded(product("bnik,bnjk->bnij", i, j) * decay * scale)
            inter = product("bnvk,bnik->bniv", rounded(state), queries[c]) * read
            within = "bnij,bniv->bnjv" if backwards else "bnij,bnjv->bniv"
            out[c] = inter + product(within, scores, values[c])
            if dotted is not None:
                written[c] = jnp.sum(inter * dotted[c], axis=2)
        stored = rounded(values[c] * write)
        state = gates[:, :, c, 0, -1, None, None] * state
        state = state + product("bnjv,bnjk->bnvk", stored, keys[c])
        if dotted is not None and backwards and c % linear.EVERY == 0:
            before = states[:, :, c // linear.EVERY].astype(jnp.float32)
            overlaps.insert(0, jnp.sum(state * before, axis=3))
    if queries is None:
        return None, state
    out = jnp.stack(out)
    if dotted is None:
        return by_token(out).astype(dtype), state
    dots = jnp.moveaxis(by_token((out * dotted).sum(-1, keepdims=True)), 1, 3)
    more = (
        [jnp.stack(written, axis=2), jnp.stack(overlaps, axis=2)]
        if backwards
        else [jnp.stack(kept, axis=2)]
    )
    return by_token(out).astype(dtype), state, dots, *more


@pytest.fixture
def written_down(monkeypatch):
    monkeypatch.setattr(rule, "prepare", prepare)
    monkeypatch.setattr(rule, "scan", scan)
    monkeypatch.setattr(linear, "attend", attend)


def worst_errors(name: str, decays: str) -> dict:
    case = CASES[name]
    if name in HOPPER_CASES:
        arguments = hopper_arguments("gated_linear_attention", name)
    else:
        arguments = case.arguments()
        del arguments["beta"]
    if arguments["g"] is not None:
        shift = SHIFTS[decays]
        arguments["g"] = 0.01 * arguments["g"] if shift is None else arguments["g"] + shift
    index = None if case.segments is None else documents_of(case.segment_ids)
    scale = case.K**-0.5

    def run(function):
        def op(initial_state=None, **arguments):
            return function(**arguments, initial_state=initial_state, scale=scale, documents=index)

        return op

    return errors(
        run(ref.gated_linear_attention), run(mosaic_gpu.gated_linear_attention), arguments
    )


@pytest.mark.parametrize("decays", SHIFTS)
@pytest.mark.parametrize("name", CASES)
def test_passes_give_the_gradients(written_down, name, decays):
    if CASES[name].decay == "none" and decays != "as_is":
        pytest.skip("no decay to change")
    found = worst_errors(name, decays)
    print(name, decays, {key: f"{value:.1e}" for key, value in found.items()})
    assert max(found.values()) < 5e-3
