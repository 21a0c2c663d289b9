"""Untied Ulysses (UPipe, arXiv 2602.21196): a mixer in stages of few heads that reuse memory.

A mixer of some of its heads is again a mixer, so each stage projects, exchanges, mixes and
exchanges back its own heads, and adds its part of the output. Only what kernels return is kept of
a stage for the backward pass, which goes through the same stages.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from efficient_lm.errors import ConfigError
from efficient_lm.model.context import Context
from efficient_lm.model.stack import REMAT_POLICIES
from efficient_lm.parallel.exchange import (
    HEAD_AXES,
    Exchange,
    axes_of,
    head_axis,
    head_count,
    parameters_of,
    rebuild,
)


@dataclass(frozen=True)
class Schedule:
    """Which heads are mixed when, and where.

    Heads are divided, the slowest first: key-value heads (each repeated `repeats` times) into
    tensor shards, chunks, devices of the exchange, `keys` a device; the query heads of each into
    stages of `queries`. So keys are exchanged once a chunk, and each query meets its own keys:
    query head n belongs to key-value head n // group, which cutting the queries into consecutive
    chunks would break.
    """

    tensor: int
    devices: int
    repeats: int
    chunks: int
    keys: int
    stages: int  # in a chunk
    queries: int

    def query_heads(self, x: Array, axis: int) -> Array:
        """[chunks, stages, ...] with the query heads of each stage along `axis` of the rest."""
        sizes = (self.tensor, self.chunks, self.devices, self.keys, self.stages, self.queries)
        x = x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, (axis + 1, axis + 4), (0, 1))
        return x.reshape(*x.shape[: axis + 2], -1, *x.shape[axis + 6 :])

    def key_heads(self, x: Array, axis: int) -> Array:
        """[chunks, ...] with the key-value heads of each chunk along `axis` of the rest."""
        x = jnp.repeat(x, self.repeats, axis=axis)
        sizes = (self.tensor, self.chunks, self.devices, self.keys)
        x = x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])
        x = jnp.moveaxis(x, axis + 1, 0)
        return x.reshape(*x.shape[: axis + 1], -1, *x.shape[axis + 4 :])


def make_schedule(
    heads: int, key_value_heads: int, *, tensor: int, devices: int, at_once: int
) -> Schedule:
    """The schedule of `at_once` query heads a stage; ConfigError where that does not divide."""
    shards = tensor * devices
    shared = math.lcm(key_value_heads, shards)
    group = heads // shared if heads % shared == 0 else 0
    mine = at_once // shards if at_once % shards == 0 else 0
    keys, queries = max(1, mine // group) if group else 0, min(mine, group)
    fits = (
        mine
        and group
        and queries * keys == mine
        and group % queries == 0
        and (shared // shards) % keys == 0
    )
    if not fits:
        allowed = [
            u
            for u in range(shards, heads + 1, shards)
            if group and _fits(u // shards, group, shared // shards)
        ]
        raise ConfigError(
            f"config.parallel.heads_at_once={at_once} does not fit {heads} query and "
            f"{key_value_heads} key-value heads over {shards} devices (tensor x sequence); "
            f"allowed: {', '.join(map(str, allowed)) or f'none, as {shards} must divide {heads}'}"
        )
    return Schedule(
        tensor,
        devices,
        repeats=shared // key_value_heads,
        chunks=shared // shards // keys,
        keys=keys,
        stages=group // queries,
        queries=queries,
    )


def _fits(mine: int, group: int, per_shard: int) -> bool:
    keys, queries = max(1, mine // group), min(mine, group)
    return queries * keys == mine and group % queries == 0 and per_shard % keys == 0


def mix_in_stages(
    exchange: Exchange, mixer: Any, x: Float[Array, "B T D"], context: Context, at_once: int
) -> Float[Array, "B T D"]:
    """The output of a mixer, `at_once` query heads at a time."""
    schedule = make_schedule(
        head_count(mixer, "heads"),
        head_count(mixer, "key_value_heads"),
        tensor=exchange.mesh.shape["tensor"],
        devices=exchange.devices,
        at_once=at_once,
    )
    graph, parameters = parameters_of(mixer)
    shared, of_chunks, of_stages, added_once = {}, {}, {}, []
    for path, leaf in parameters.items():
        axis, place = head_axis(leaf)
        array = leaf[...]
        if "embed" in axes_of(leaf) and array.ndim > 1:
            # Gathered once, in the type of the products, and not in every stage.
            whole = (name if name in HEAD_AXES else None for name in axes_of(leaf))
            array = context.shard(array.astype(x.dtype), *whole)
        if axis == "heads":
            of_stages[path] = schedule.query_heads(array, place)
        elif axis == "key_value_heads":
            of_chunks[path] = schedule.key_heads(array, place)
        elif axes_of(leaf) == ("embed",):
            added_once.append(array)
            shared[path] = jnp.zeros_like(array)
        else:
            shared[path] = array
    by_chunk = [name for name, axis in mixer.head_axes.items() if axis == "key_value_heads"]
    by_stage = [name for name, axis in mixer.head_axes.items() if axis == "heads"]
    fixed = jax.lax.stop_gradient(x)

    def part(*arrays):
        values = shared | {path: array for group in arrays for path, array in group.items()}
        return rebuild(graph, {p: leaf.replace(values.get(p)) for p, leaf in parameters.items()})

    def exchanged_of(projected):
        return {n: exchange.to_heads(y) for n, y in projected.items() if n in mixer.core_reads}

    def chunk(carry, scanned):
        y, into, out_of = carry
        keys, queries = scanned
        exchanged = {}
        if by_chunk:
            seen, into = _into(fixed, into)
            exchanged = exchanged_of(part(keys).project(seen, context, by_chunk))

        def stage(carry, queries):
            y, into, out_of = carry
            seen, into = _into(fixed, into)
            piece = part(keys, queries)
            projected = piece.project(seen, context, by_stage)
            entries = exchanged | exchanged_of(projected)
            mixed = exchange.to_tokens(exchange.core(piece, entries, context))
            added = piece.output(mixed, projected, context)
            y = y + jax.lax.stop_gradient(added).astype(jnp.float32)
            return (y, into, _out_of(added, out_of)), None

        return jax.lax.scan(_keep_little(stage), (y, into, out_of), queries)

    start = (jnp.zeros(x.shape, jnp.float32), _enter(x), jnp.zeros_like(x))
    (y, into, out_of), _ = jax.lax.scan(_keep_little(chunk), start, (of_chunks, of_stages))
    y = _leave(y.astype(x.dtype), into, out_of)
    for array in added_once:
        y = y + array.astype(x.dtype)[None, None]
    return context.shard(y, "batch", "residual_length", "embed")


# Every stage reads x and adds to y. Differentiated as it stands, a loop would sum the gradient of
# x in the type of x, rounding at each stage, and hand the gradient of y on in float32. So two
# arrays of zeros that nobody reads go through the loops for the sake of their cotangents: `into`,
# in float32, gathers the gradient of x, and `out_of`, in the type of x, brings that of y.


@jax.custom_vjp
def _enter(x):
    """Where the gradient of x comes out."""
    return jnp.zeros(x.shape, jnp.float32)


_enter.defvjp(
    lambda x: (_enter(x), jnp.zeros((0,), x.dtype)),
    lambda like, gradient: (gradient.astype(like.dtype),),
)


@jax.custom_vjp
def _into(x, into):
    """(x, into); the gradient of the first is added to that of the second."""
    return x, into


_into.defvjp(
    lambda x, into: ((x, into), None),
    lambda _, gradients: (None, gradients[0].astype(jnp.float32) + gradients[1]),
)


@jax.custom_vjp
def _out_of(added, out_of):
    """`out_of`, whose gradient is also that of what is added."""
    del added
    return out_of


_out_of.defvjp(lambda added, out_of: (out_of, None), lambda _, gradient: (gradient, gradient))


@jax.custom_vjp
def _leave(y, into, out_of):
    """y, whose gradient goes to `out_of`; that of `into` starts at zero."""
    del into, out_of
    return y


def _start_gradients(_, gradient):
    # Zeros that XLA knows as such it would select in the loop, which takes a second array of them.
    zeros = jax.lax.optimization_barrier(jnp.zeros(gradient.shape, jnp.float32))
    return None, zeros, gradient


_leave.defvjp(lambda y, into, out_of: (y, None), _start_gradients)


def _keep_little(body):
    """A scan body whose backward pass computes again all but the results of kernels."""
    return jax.checkpoint(body, policy=REMAT_POLICIES["mixer"], prevent_cse=False)
