"""Chunks of tokens counted from the start of each packed document, for memories that need them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped


class Layout(NamedTuple):
    """Where the M whole chunks of a row are, counted from the start of each document.

    chunks: slots of the tokens of each whole chunk; following: of those that are read with the
    weights that it leaves, the next chunk of its document; T where there is none. valid: there is
    such a chunk; fresh: it is the first of a document that is not the row's first. place: of each
    token in `following`, -1 for the first C tokens of a document. ends_fresh: the last document has
    no whole chunk and is not the first. rest: slots of the tokens after the last whole chunk.
    """

    chunks: Int[Array, "B M C"]
    following: Int[Array, "B M C"]
    valid: Bool[Array, "B M"]
    fresh: Bool[Array, "B M"]
    place: Int[Array, "B T"]
    ends_fresh: Bool[Array, "B"]
    rest: Int[Array, "B R"]


def make_layout(index: Int[Array, "B T"], real: Bool[Array, "B T"], size: int) -> Layout:
    """The layout of documents (`pallas_kernels` recurrence.documents) in chunks of `size`."""
    length = index.shape[1]
    count = jnp.sum(real, axis=1, dtype=jnp.int32)[:, None]
    rank = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    slot = jnp.argsort(~real, axis=1, stable=True).astype(jnp.int32)  # of each rank
    starts = jnp.diff(index, axis=1, prepend=0) > 0
    position = rank - jax.lax.cummax(jnp.where(starts, rank, 0), axis=1)
    ends = real & (position % size == size - 1)
    order = jnp.argsort(~ends, axis=1, stable=True).astype(jnp.int32)[:, : length // size]
    whole = jnp.sum(ends, axis=1, dtype=jnp.int32)
    valid = jnp.arange(order.shape[1], dtype=jnp.int32)[None] < whole[:, None]
    end_rank = jnp.take_along_axis(rank, order, axis=1)[:, :, None]
    document = jnp.take_along_axis(index, order, axis=1)
    document = jax.lax.cummax(jnp.where(valid, document, 0), axis=1)
    step = jnp.arange(size, dtype=jnp.int32)[None, None]

    def at(ranks):
        """Slots of these ranks, `length` beyond the last."""
        flat = jnp.clip(ranks, 0, length - 1).reshape(len(ranks), -1)
        found = jnp.take_along_axis(slot, flat, axis=1).reshape(ranks.shape)
        return jnp.where(ranks < count.reshape(-1, *[1] * (ranks.ndim - 1)), found, length)

    following = at(end_rank + 1 + step)
    flat = jnp.minimum(following, length - 1).reshape(len(index), -1)
    theirs = jnp.take_along_axis(index, flat, axis=1).reshape(following.shape)
    mine = valid[:, :, None] & (theirs == document[:, :, None])
    before = jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends.astype(jnp.int32)
    last = jnp.max(jnp.where(real, rank, -1), axis=1, keepdims=True)
    last_slot = jnp.minimum(at(last), length - 1)
    left = jnp.take_along_axis(position, last_slot, axis=1) + 1
    left = jnp.where(count > 0, left % size, 0)
    rest = jnp.arange(size - 1, dtype=jnp.int32)[None]
    before_first = jnp.zeros_like(document[:, :1])
    return Layout(
        chunks=jnp.where(valid[:, :, None], at(end_rank - (size - 1) + step), length),
        following=jnp.where(mine, following, length),
        valid=valid,
        fresh=valid & (jnp.diff(document, axis=1, prepend=before_first) > 0),
        place=jnp.where(real & (position >= size), (before - 1) * size + position % size, -1),
        ends_fresh=index[:, -1] > jnp.max(document, axis=1, initial=0),
        rest=jnp.where(rest < left, at(count - left + rest), length),
    )


def gather(x: Shaped[Array, "B T *rest"], slots: Int[Array, "B *places"]) -> Array:
    """x at these slots of each row, 0 where a slot is T."""
    return jax.vmap(lambda x, slots: x.at[slots].get(mode="fill", fill_value=0))(x, slots)
