"""What the Hopper passes that are written down in jnp have in common: layouts, gates, cases."""

import functools

import jax.numpy as jnp
from recurrence_cases import HOPPER_CASES, Case, errors, hopper_arguments

from pallas_kernels._core.recurrence import documents as documents_of
from pallas_kernels._hopper.tiles import CHUNK

MANY_CHUNKS = Case(B=2, T=630, H=1, N=2, K=64, V=64, initial_state=True, dtype="bfloat16")
EIGHT_PIECES = Case(T=1000, H=1, N=1, K=64, V=64, initial_state=True, dtype="bfloat16")
DECAYS = {
    "near_one": lambda g: 0.01 * g,
    "near_zero": lambda g: g - 4.0,
    "of_all_sizes": lambda g: -jnp.exp(40.0 * g + 2.0),
}


def by_chunk(x, heads: int = 1):
    """[B, T, H, F] as fp32 [chunks, B, N, C, F]; [B, N, T] as [chunks, B, N, C]."""
    if x.ndim == 3:
        return jnp.moveaxis(x.reshape(*x.shape[:2], -1, CHUNK), 2, 0)
    B, T, H, F = x.shape
    x = jnp.repeat(x.astype(jnp.float32), heads // H, axis=2)
    return jnp.moveaxis(x.reshape(B, T // CHUNK, CHUNK, heads, F), (1, 3), (0, 2))


def by_token(x, dtype):
    """[chunks, B, N, C, F] as [B, T, N, F]."""
    x = jnp.moveaxis(x, (0, 2), (1, 3))
    return x.reshape(x.shape[0], -1, *x.shape[3:]).astype(dtype)


def product(text, *arrays):
    return jnp.einsum(text, *(x.astype(jnp.float32) for x in arrays), precision="highest")


def rounded(x, dtype):
    return x.astype(dtype).astype(jnp.float32)


def decays(summed, documents):
    """exp(G_i - G_j) for j <= i of one document: [chunks, B, N, C, C]."""
    summed = by_chunk(summed)
    keep = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))[None, None, None]
    if documents is not None:
        own = by_chunk(documents[:, None])
        keep = keep & (own[..., :, None] == own[..., None, :])
    return jnp.exp(jnp.where(keep, summed[..., :, None] - summed[..., None, :], -jnp.inf))


def summed_and_gates(g, documents):
    """Those of `prepare`: [B, N, T] and [B, N, chunks, 2, C]."""
    B, N, T = g.shape
    summed = jnp.cumsum(g.reshape(B, N, -1, CHUNK), axis=3)
    before, after = jnp.exp(summed), jnp.exp(summed[..., -1:] - summed)
    if documents is not None:
        own = documents.reshape(B, 1, -1, CHUNK)
        last = jnp.pad(own[:, :, :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0)))
        before = jnp.where(own == last, before, 0.0)
        after = jnp.where(own == own[..., -1:], after, 0.0)
    return summed.reshape(B, N, T), jnp.stack([before, after], axis=3)


def found(op: str, reference, function, cases: dict[str, Case], name: str, decays: str) -> dict:
    """Errors of the op's function against the recurrence, by what they are of."""
    case = cases[name]
    arguments = hopper_arguments(op, name) if name in HOPPER_CASES else case.arguments()
    if op == "gated_linear_attention":
        arguments.pop("beta", None)
    if decays in DECAYS:
        arguments["g"] = DECAYS[decays](arguments["g"])
    index = None if case.segments is None else documents_of(case.segment_ids)

    def run(function, initial_state=None, **arguments):
        return function(
            **arguments, initial_state=initial_state, scale=case.K**-0.5, documents=index
        )

    of = errors(functools.partial(run, reference), functools.partial(run, function), arguments)
    print(name, decays, {key: f"{value:.1e}" for key, value in of.items()})
    return of
