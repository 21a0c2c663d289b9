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


def all_tokens(function: Callable, weight: Array, *arrays: Array, dtype: Any, summed: bool) -> Any:
    """The default of `over_tokens`: one call of function(weight, *arrays) for all tokens."""
    del dtype, summed
    return function(weight, *arrays)


def run_mixer(mixer: Any, x: Array, context: "Context", state: Any) -> tuple[Array, Any, dict]:
    """The default of `mix`: (y, new decode state or None, auxiliary values) of one device."""
    projected = mixer.project(x, context)
    mixed, state, aux = mixer.core(projected, context, state)
    return mixer.output(mixed, projected, context), state, aux


@dataclass(frozen=True)
class Split:
    """Over how many devices the arrays of a layer are split.

    tokens: those that share the tokens of a row. features: those that share heads and features.
    ring: the mesh axis over which a core's own tokens are split, or None.
    """

    tokens: int = 1
    features: int = 1
    ring: str | None = None


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
    mix: (mixer, x, context, state) -> (y, state, aux), from `parallel`: how a mixer's parts run.
    split: what the devices share.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"] | None = None
    index: Int[Array, "B T"] | None = None
    mask: masks.MaskExpression = field(default_factory=masks.Causal)
    fresh: bool = field(default=False, metadata={"static": True})
    shard: Callable = field(default=no_sharding, metadata={"static": True})
    mix: Callable = field(default=run_mixer, metadata={"static": True})
    split: Split = field(default=Split(), metadata={"static": True})
