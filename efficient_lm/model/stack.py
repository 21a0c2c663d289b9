"""The layers: a scan over the repeating period, so that compile time is flat in depth."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from efficient_lm.config import ModelConfig, layer_options
from efficient_lm.model.block import Block
from efficient_lm.model.context import Context


def mixers(primitive, *arguments, **parameters) -> bool:
    """Keep what kernels name "attention" or "mixer": outputs that cost most at long contexts."""
    if primitive.name == "name":
        return parameters["name"] in ("attention", "mixer")
    return primitive.name.startswith("dot_product_attention")  # cuDNN's, with its log-sum-exp


def products(primitive, *arguments, **parameters) -> bool:
    """Keep matrix products and what attention computed, and compute all element-wise work again.

    On GPUs this beats keeping everything: reading fp32 intermediates back costs more time.
    """
    return mixers(primitive, **parameters) or (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
            primitive, *arguments, **parameters
        )
    )


COPIED_AT_ONCE = 2**31  # bytes of a row on a device

# What the backward pass may keep of a layer instead of computing it again.
REMAT_POLICIES = {
    "products": products,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mixer": mixers,
    # As "full", and the inputs of layers wait in the memory of the host.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Stack(nnx.Module):
    """`num_layers` blocks that repeat the pattern.

    `period` holds one block per place of the pattern, its arrays stacked over the repeats along a
    leading axis "layers"; `rest` holds single blocks: the remainder, or all when `scan` is False.
    """

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs, *, scan: bool = True):
        self.remat = model.remat
        pattern = layer_options(model)
        repeats = model.num_layers // len(pattern)
        self.repeats = repeats if scan and repeats > 1 else 0

        def block(place, rngs):
            return Block(model, *pattern[place % len(pattern)], rngs)

        self.period = nnx.List(
            [_stacked(lambda r, p=p: block(p, r), self.repeats, rngs) for p in range(len(pattern))]
            if self.repeats
            else []
        )
        scanned = self.repeats * len(pattern)
        self.rest = nnx.List([block(p, rngs) for p in range(scanned, model.num_layers)])

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        state: Any = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, Any]:
        """(x, state, aux), the last two as (stacked values per place, values per single block)."""
        period_state, rest_state = (None, None) if state is None else state
        period_aux, rest_aux = (), ()
        if self.repeats:
            graph, parameters = nnx.split(self.period)
            keys = None
            if dropout_key is not None:
                keys = jax.random.split(jax.random.fold_in(dropout_key, 0), self.repeats)

            def one_period(x, scanned):
                parameters, states, key = scanned
                blocks = nnx.merge(graph, parameters)
                return self._apply(blocks, x, context, states, key, scanned=True)

            x, (period_state, period_aux) = jax.lax.scan(
                one_period, x, (parameters, period_state, keys)
            )
        if self.rest:
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, 1)
            x, (rest_state, rest_aux) = self._apply(
                self.rest, x, context, rest_state, key, scanned=False
            )
        new_state = None if state is None else (period_state, rest_state)
        return x, new_state, (period_aux, rest_aux)

    def _apply(self, blocks, x, context, states, dropout_key, *, scanned: bool):
        """Run blocks in order, each under the remat policy; (x, (states, aux))."""
        new_states, auxes = [], []
        for place, block in enumerate(blocks):
            graph, parameters = nnx.split(block)

            def run(parameters, x, context, state, key, graph=graph):
                x = _named_input(x, context.split.tokens)
                return nnx.merge(graph, parameters)(x, context, state, key)

            if self.remat != "none":
                # Inside a scan the loop already keeps the compiler from merging the two passes.
                run = jax.checkpoint(
                    run, policy=REMAT_POLICIES[self.remat], prevent_cse=not scanned
                )
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, place)
            state = None if states is None else states[place]
            x, state, aux = run(parameters, x, context, state, key)
            new_states.append(state)
            auxes.append(aux)
        return x, (None if states is None else tuple(new_states), tuple(auxes))

    def init_state(self, batch: int, max_length: int, dtype) -> tuple:
        """Empty decode state of every layer."""
        period = tuple(
            jax.tree.map(
                lambda leaf: jnp.broadcast_to(leaf[None], (self.repeats, *leaf.shape)),
                block.mixer.init_state(batch, max_length, dtype),
            )
            for block in self.period
        )
        rest = tuple(block.mixer.init_state(batch, max_length, dtype) for block in self.rest)
        return period if self.repeats else None, rest if rest else None


def _named_input(x: Float[Array, "B T D"], devices: int) -> Float[Array, "B T D"]:
    """`x`, which remat may keep by the name "layer_input"; `devices` share the tokens of a row.

    In pieces of features beyond 2 GiB a device: libtpu cannot copy 4 GiB to the host at once.
    """
    bytes_a_row = x.shape[1] * x.shape[2] * x.dtype.itemsize // devices
    if bytes_a_row <= COPIED_AT_ONCE:
        return checkpoint_name(x, "layer_input")
    pieces = jnp.array_split(x, 2 ** math.ceil(math.log2(bytes_a_row / COPIED_AT_ONCE)), axis=2)
    return jnp.concatenate([checkpoint_name(piece, "layer_input") for piece in pieces], axis=2)


def _stacked(make, repeats: int, rngs: nnx.Rngs):
    """One module whose parameters are `repeats` draws stacked along a leading axis "layers"."""
    graph = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
    state = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(
        jax.random.split(rngs.params(), repeats)
    )
    is_parameter = lambda leaf: isinstance(leaf, nnx.Param)  # noqa: E731
    state = jax.tree.map(
        lambda leaf: nnx.Param(
            leaf[...], axes=("layers", *leaf.axes), inputs=leaf.inputs, outputs=leaf.outputs
        ),
        state,
        is_leaf=is_parameter,
    )
    return nnx.merge(graph, state)
