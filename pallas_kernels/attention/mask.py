"""Which key a query may attend to, as plain data that every implementation can read."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True)
class Term:
    """A conjunction of conditions on query index q and key index k; the empty one is always true.

    causal:          k <= q
    window:          q - k < window (tokens looked back, the query's own included)
    segments:        same segment, which is not 0
    prefix:          k < prefix_length of the row
    block_causal:    k // size <= q // size, for each size
    block_diagonal:  k // size == q // size, for each size
    """

    causal: bool = False
    window: int | None = None
    segments: bool = False
    prefix: bool = False
    block_causal: tuple[int, ...] = ()
    block_diagonal: tuple[int, ...] = ()


@dataclass(frozen=True)
class Mask:
    """A disjunction of `terms` with the arrays they speak of. `Mask()` allows every key.

    A pytree: `terms` is static, the arrays are leaves. Leading dimension b is B, or 1 to be shared
    by all rows. Indices count tokens of the running sequence; None means 0, 1, 2, ... (queries and
    keys aligned at 0). A key index of -1 is an empty cache slot, which no term can allow.

    query_index, query_segments: int32 [b, T] or None
    key_index, key_segments:     int32 [b, S] or None; segment 0 is padding
    prefix_length:               int32 [b] or None
    """

    terms: tuple[Term, ...] = (Term(),)
    query_index: Any = None
    key_index: Any = None
    query_segments: Any = None
    key_segments: Any = None
    prefix_length: Any = None

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "b T S"]:
        """True where attention is allowed: the specification of a mask. b is B or 1."""
        mask = self.with_indices(query_length, key_length)
        return allowed(mask, mask.query_index, mask.key_index)

    def with_indices(self, query_length: int, key_length: int) -> "Mask":
        """The same mask with index arrays in place of None."""
        query_index, key_index = self.query_index, self.key_index
        if query_index is None:
            query_index = jnp.arange(query_length, dtype=jnp.int32)[None]
        if key_index is None:
            key_index = jnp.arange(key_length, dtype=jnp.int32)[None]
        return replace(self, query_index=query_index, key_index=key_index)

    def slice(self, of_queries: Callable, of_keys: Callable) -> "Mask":
        """The mask of some queries and keys; the functions cut these from an array of tokens."""
        cuts = {
            "query_index": of_queries,
            "query_segments": of_queries,
            "key_index": of_keys,
            "key_segments": of_keys,
        }
        arrays = {name: getattr(self, name) for name in cuts}
        return replace(self, **{n: None if a is None else cuts[n](a) for n, a in arrays.items()})

    def check(self, batch: int, query_length: int, key_length: int) -> None:
        """Raise ValueError where an array is missing or does not fit [B, T] and [B, S]."""
        shapes = {
            "query_index": (batch, query_length),
            "key_index": (batch, key_length),
            "query_segments": (batch, query_length),
            "key_segments": (batch, key_length),
            "prefix_length": (batch,),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is not None and array.shape not in (shape, (1, *shape[1:])):
                raise ValueError(
                    f"mask.{name} has shape {array.shape}; it must be {shape} or {(1, *shape[1:])}"
                )
        for term in self.terms:
            if term.segments and (self.query_segments is None or self.key_segments is None):
                raise ValueError("mask has a segments term; give query_segments and key_segments")
            if term.prefix and self.prefix_length is None:
                raise ValueError("mask has a prefix term; give prefix_length")


jax.tree_util.register_dataclass(
    Mask,
    data_fields=["query_index", "key_index", "query_segments", "key_segments", "prefix_length"],
    meta_fields=["terms"],
)


def allowed(
    mask: Mask, query_index: Int[Array, "q T"], key_index: Int[Array, "k S"]
) -> Bool[Array, "b T S"]:
    """`mask` between tokens of the given indices; its segment arrays must be those tokens' own."""
    q, k = query_index[:, :, None], key_index[:, None, :]
    filled = k >= 0
    result = jnp.zeros((1, q.shape[1], k.shape[2]), bool)
    for term in mask.terms:
        fits = filled
        if term.causal:
            fits &= k <= q
        if term.window is not None:
            fits &= q - k < term.window
        if term.segments:
            key_segments = mask.key_segments[:, None, :]
            fits &= (mask.query_segments[:, :, None] == key_segments) & (key_segments != 0)
        if term.prefix:
            fits &= k < mask.prefix_length[:, None, None]
        for size in term.block_causal:
            fits &= k // size <= q // size
        for size in term.block_diagonal:
            fits &= k // size == q // size
        result |= fits
    return result
