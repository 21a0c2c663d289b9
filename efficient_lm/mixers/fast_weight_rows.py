"""Rows of tokens read with fast weights that learn, chunk by chunk of each packed document."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from efficient_lm.mixers import fast_weights
from efficient_lm.mixers.document_chunks import gather, make_layout
from efficient_lm.mixers.fast_weights import Chunk, Learned, Rule, Steps, Weights
from pallas_kernels._core.recurrence import documents

Form = Literal["auto", "sequential", "parallel"]


def run(rule: Rule, form: Form, initial: Weights, start: Learned, steps: Steps):
    """(reads [B, M, C, N, Dv], learned) by `form`; "auto" is parallel where the rule is linear."""
    one_chunk = steps.valid.shape[1] == 1
    if form == "parallel" or (form == "auto" and rule.is_linear and not one_chunk):
        return fast_weights.all_at_once(rule, initial, start, steps)
    if not one_chunk:
        return fast_weights.one_by_one(rule, initial, start, steps)

    def learn():
        return fast_weights.one_by_one(rule, initial, start, steps)

    def skip():
        batch, count, size, heads, _ = steps.queries.shape
        width = initial["last"].shape[-1]
        return jnp.zeros((batch, count, size, heads, width), steps.queries.dtype), start

    # A decode step completes a chunk but once in C times.
    return jax.lax.cond(jnp.any(steps.valid), learn, skip)


def read_rows(
    rule: Rule,
    form: Form,
    size: int,
    initial: Weights,
    start: Learned,
    query: Float[Array, "B T N Dk"],
    chunk: Chunk,
) -> Float[Array, "B T N Dv"]:
    """What the queries read in rows of one document without padding, in chunks of `size`."""
    batch, length = query.shape[:2]
    count = (length - 1) // size  # nothing is read with what the last chunk would leave
    first = fast_weights.apply(initial, query[:, :size])
    if length <= size:
        return first

    def cut(x):
        return x[:, : count * size].reshape(batch, count, size, *x.shape[2:])

    later = jnp.pad(query, ((0, 0), (0, (count + 1) * size - length), (0, 0), (0, 0)))[:, size:]
    steps = Steps(
        jax.tree.map(cut, chunk),
        cut(later),
        jnp.ones((batch, count), bool),
        jnp.zeros((batch, count), bool),
    )
    after, _ = run(rule, form, initial, start, steps)
    after = after.reshape(batch, count * size, *after.shape[3:])[:, : length - size]
    return jnp.concatenate([first, after], axis=1)


def read_documents(
    rule: Rule,
    form: Form,
    size: int,
    initial: Weights,
    start: Learned | None,
    query: Float[Array, "B T N Dk"],
    chunk: Chunk,
    segment_ids: Int[Array, "B S"],
) -> tuple[Float[Array, "B T N Dv"], Learned, Chunk, Int[Array, "B"]]:
    """The same in rows of packed documents, each of which starts from `initial`; 0 is padding.

    start: what the first document of each row has learned before; None: nothing. chunk and
    segment_ids may have tokens before those of the queries, which no query stands for.
    Returns (reads, what the last document has learned, its tokens that no whole chunk has
    [B, size - 1, ...], how many these are).
    """
    batch, length = query.shape[:2]
    before = segment_ids.shape[1] - length
    index, real = documents(segment_ids)
    layout = make_layout(index, real, size)
    out = fast_weights.apply(initial, query)
    if start is None:
        start = fast_weights.nothing_learned(rule, initial, batch)
    else:
        weights = {name: initial[name][None] + x for name, x in start.changes.items()}
        goes_on = fast_weights.apply(initial | weights, query)
        out = jnp.where((index[:, before:] == 0)[:, :, None, None], goes_on, out)
    learned = start
    if layout.valid.shape[1]:
        queries = jnp.pad(query, ((0, 0), (before, 0), (0, 0), (0, 0)))
        steps = Steps(
            jax.tree.map(lambda x: gather(x, layout.chunks), chunk),
            gather(queries, layout.following),
            layout.valid,
            layout.fresh,
        )
        after, learned = run(rule, form, initial, start, steps)
        after = after.reshape(batch, -1, *after.shape[3:])
        place = layout.place[:, before:]
        after = gather(after, jnp.maximum(place, 0))
        out = jnp.where((place >= 0)[:, :, None, None], after, out)
    ends_fresh = layout.ends_fresh[:, None, None, None]
    learned = jax.tree.map(lambda x: jnp.where(ends_fresh, 0.0, x), learned)
    rest = jax.tree.map(lambda x: gather(x, layout.rest), chunk)
    count = jnp.sum(layout.rest < segment_ids.shape[1], axis=1, dtype=jnp.int32)
    return out, learned, rest, count
