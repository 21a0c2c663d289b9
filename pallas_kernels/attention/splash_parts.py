"""Attention by the splash kernel to more tokens than its tables can list: in parts, merged."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels.attention import schedule, splash, tile
from pallas_kernels.attention.mask import Mask

SIZES = (65_536, 32_768, 16_384, 8192)  # tokens of a part, the larger the less there is to merge


@dataclass(frozen=True)
class Options:
    """What is static; `size` is that of a part of the queries or keys."""

    scale: float
    soft_cap: float | None
    size: int
    interpret: bool


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: Mask,
    scale: float,
    soft_cap: float | None = None,
    sinks: None = None,
    return_log_sum_exp: bool = False,
    sizes: tuple[int, ...] = SIZES,
    interpret: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """`ref.attention` on a TPU, within what `support.TABLE` declares; as `splash.attention`.

    sizes: of a part; the first that divides both lengths is taken.
    """
    options = Options(scale, soft_cap, _size(q, k, sizes), interpret)
    if return_log_sum_exp:
        return _forward(options, q, k, v, mask)[1][-2:]
    return _attend(options, q, k, v, mask)


def gradients(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    out: Float[Array, "B T N H"],
    log_sum_exp: Float[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    *,
    mask: Mask,
    scale: float,
    soft_cap: float | None = None,
    sizes: tuple[int, ...] = SIZES,
    interpret: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """`ref.gradients`, in parts."""
    options = Options(scale, soft_cap, _size(q, k, sizes), interpret)
    of_queries = (q, out, log_sum_exp, d_out)

    def visit(gradients, place):
        row, column, _ = place
        queries, *rest = (_take(array, row, options) for array in of_queries)
        keys, values = (_take(array, column, options) for array in (k, v))
        parts = _run(splash.gradients, options, mask, row, column, queries, keys, values, *rest)
        places = (row, column, column)
        return tuple(map(functools.partial(_add, options), gradients, parts, places)), None

    nothing = tuple(jnp.zeros(array.shape, jnp.float32) for array in (q, k, v))
    return jax.lax.scan(visit, nothing, _places(mask, q, k, options))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, mask):
    return _forward(options, q, k, v, mask)[0]


def _forward(options, q, k, v, mask):
    """The output, and what the backward pass needs."""

    def visit(carry, place):
        state, out, lse = carry
        row, column, first = place
        state = jax.tree.map(lambda old, new: jnp.where(first, new, old), state, nothing)
        arrays = _take(q, row, options), *(_take(array, column, options) for array in (k, v))
        part = _run(splash.attention, options, mask, row, column, *arrays, return_log_sum_exp=True)
        state = tile.merge(state, part)
        # A row is overwritten until its last part: no branch, and it costs little.
        out = _put(options, out, state[0].astype(q.dtype), row)
        return (state, out, _put(options, lse, state[1], row)), None

    B, T, N, H = q.shape
    rows = (B, options.size, N)
    nothing = jnp.zeros((*rows, H), jnp.float32), jnp.full(rows, -jnp.inf, jnp.float32)
    start = nothing, jnp.zeros_like(q), jnp.zeros((B, T, N), jnp.float32)
    (_, *found), _ = jax.lax.scan(visit, start, _places(mask, q, k, options))
    out, lse = checkpoint_name(tuple(found), "attention")
    return out, (q, k, v, mask, out, lse)


def _backward(options, residuals, d_out):
    q, k, v, mask, out, lse = residuals
    found = gradients(
        q, k, v, out, lse, d_out,
        mask=mask, scale=options.scale, soft_cap=options.soft_cap, sizes=(options.size,),
        interpret=options.interpret,
    )  # fmt: skip
    return *(part.astype(like.dtype) for part, like in zip(found, (q, k, v), strict=True)), None


_attend.defvjp(_forward, _backward)


def _run(function, options, mask, row, column, *arrays, **keywords):
    """`function` of splash on the queries of part `row` and the keys of part `column`."""
    cut = mask.slice(
        lambda array: _take(array, row, options), lambda array: _take(array, column, options)
    )
    term = cut.terms[0]

    def run(causal):
        part = replace(cut, terms=(replace(term, causal=causal),))
        return function(
            *arrays, mask=part, scale=options.scale, soft_cap=options.soft_cap,
            interpret=options.interpret, **keywords,
        )  # fmt: skip

    if not term.causal:
        return run(False)
    return jax.lax.cond(row == column, lambda: run(True), lambda: run(False))


def _places(mask, q, k, options):
    """Rows, columns and first-of-row flags of the pairs of parts to visit."""
    pairs = schedule.visits(mask, q.shape[1], k.shape[1], options.size, options.size)
    return jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1]), jnp.asarray(pairs[:, 2] == 1)


def _size(q, k, sizes) -> int:
    return next(size for size in sizes if q.shape[1] % size == k.shape[1] % size == 0)


def _take(array, part, options):
    """Part number `part` of the tokens of an array [B, tokens, ...]."""
    return jax.lax.dynamic_slice_in_dim(array, part * options.size, options.size, axis=1)


def _put(options, array, piece, part):
    return jax.lax.dynamic_update_slice_in_dim(array, piece, part * options.size, axis=1)


def _add(options, array, piece, part):
    return _put(options, array, _take(array, part, options) + piece, part)
