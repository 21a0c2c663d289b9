"""How a mixer runs on a mesh: each device mixes all tokens of its rows for some of the heads.

Outside of `core` tokens are split over the mesh axes TOKENS. An all-to-all over "sequence" gives
each device all tokens of fewer heads (DeepSpeed-Ulysses, arXiv 2309.14509); with a "ring" axis too,
a core has the tokens of its place on the ring (USP, arXiv 2405.07719).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh
from jaxtyping import Array, Float

from efficient_lm.config import ParallelConfig
from efficient_lm.model.context import Context, Split, run_mixer
from efficient_lm.parallel.exchange import Exchange, head_count, repeat_heads
from efficient_lm.parallel.rules import TOKENS, activation_sharder
from efficient_lm.parallel.upipe import mix_in_stages
from efficient_lm.parallel.vocabulary import over_tokens


def make_mix(mesh: Mesh, config: ParallelConfig) -> Callable:
    """The function that layers call as `context.mix(mixer, x, context, state)`.

    Needs of a mixer: `head_axes` names the head axis (axis 2) of each entry that `project` gives;
    `core` reads the entries `core_reads`, and no parameter with an "embed" axis; all parts read
    the number of heads from arrays; parameters along ("embed",) alone are added to the output;
    with `has_ring`, its core goes along the mesh axis `context.split.ring`.
    `config.heads_at_once` query heads are exchanged at a time; `check_mesh` refuses that where the
    mixer's options have `joins_heads`, which says that its `output` needs all of them.
    """
    exchange = Exchange(mesh)

    def mix(mixer: Any, x: Float[Array, "B T D"], context: Context, state: Any):
        if state is not None:  # decoding is not split by tokens
            return run_mixer(mixer, x, context, state)
        heads = head_count(mixer, "heads")
        if config.heads_at_once is not None and config.heads_at_once < heads:
            return mix_in_stages(exchange, mixer, x, context, config.heads_at_once), None, {}
        projected = mixer.project(x, context)
        entries = {
            name: exchange.to_heads(
                repeat_heads(exchange, mixer, projected[name], mixer.head_axes[name], 2)
            )
            for name in mixer.core_reads
        }
        mixed = exchange.to_tokens(exchange.core(mixer, entries, context))
        return mixer.output(mixed, projected, context), None, {}

    return mix


def use_mesh(model: Any, mesh: Mesh, config: ParallelConfig) -> None:
    """Let a bound model run on `mesh`."""
    if mesh.size > 1:
        model.shard = activation_sharder(mesh, config.rules)
        tokens = math.prod(mesh.shape[axis] for axis in TOKENS)
        model.split = Split(tokens=tokens, features=mesh.shape["tensor"])
        model.over_tokens = functools.partial(over_tokens, mesh, config.rules)
    if mesh.size > 1 or config.heads_at_once is not None:
        model.mix = make_mix(mesh, config)
