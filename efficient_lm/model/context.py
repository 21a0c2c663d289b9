"""What a layer may know of the sequence besides its own input."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jaxtyping import Array, Int

from efficient_lm import masks


def no_sharding(x: Array, *axes: str | None) -> Array:
    """The default of `shard`: leave the placement of activations to the compiler."""
    del axes
    return x


def unsplit(function: Callable, batched: tuple, shared: tuple) -> Any:
    """The default of `per_shard`: one call for the whole batch."""
    return function(*batched, *shared)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """Shared by all layers of one forward pass.

    positions: for position embeddings; restart in each packed document.
    segment_ids: document of each token, 0 = padding; None: one document, no padding.
    index: running index of each token in its sequence, -1 = padding; None without decode state.
    mask: which tokens may see which, before a layer's own window and the segments.
    fresh: the decode state is known to be empty, so tokens need only look at each other.
    shard: (array, logical axis names...) -> array, from `parallel`; mixers name no mesh axis.
    per_shard: (function, batched, shared) -> function(*batched, *shared) on each device's rows of
      `batched`, from `parallel`; for kernels, which the compiler cannot split.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None
    index: Int[Array, "B T"] | None = None
    mask: masks.MaskExpression = field(default_factory=masks.Causal)
    fresh: bool = field(default=False, metadata={"static": True})
    shard: Callable = field(default=no_sharding, metadata={"static": True})
    per_shard: Callable = field(default=unsplit, metadata={"static": True})
