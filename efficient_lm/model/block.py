"""One layer: mixer and feed-forward on a residual stream, with norms placed as configured."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from efficient_lm import registry
from efficient_lm.config import LayerConfig, ModelConfig
from efficient_lm.errors import ConfigError
from efficient_lm.model.context import Context
from efficient_lm.model.norm import RMSNorm


class Residual(nnx.Module):
    """x + f(norm(x)) [pre], norm(x + f(x)) [post] or x + norm(f(norm(x))) [sandwich]."""

    def __init__(self, model: ModelConfig):
        self.placement = model.norm_placement
        self.dropout = model.dropout
        if self.placement != "post":
            self.norm_in = RMSNorm(model, model.embed_dim)
        if self.placement != "pre":
            self.norm_out = RMSNorm(model, model.embed_dim)

    def enter(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The input of the branch."""
        return x if self.placement == "post" else self.norm_in(x)

    def leave(
        self,
        x: Float[Array, "B T D"],
        branch: Float[Array, "B T D"],
        dropout_key: Key[Array, ""] | None,
    ) -> Float[Array, "B T D"]:
        """The stream after the branch is added."""
        if self.placement == "sandwich":
            branch = self.norm_out(branch)
        x = x + dropout(branch, self.dropout, dropout_key)
        return self.norm_out(x) if self.placement == "post" else x


class Block(nnx.Module):
    """A mixer and a feed-forward, each on its residual branch."""

    def __init__(
        self, model: ModelConfig, layer: LayerConfig, mixer_options, ffn_options, rngs: nnx.Rngs
    ):
        self.ffn_tokens_at_once = model.ffn_tokens_at_once
        self.mixer_residual = Residual(model)
        self.mixer = registry.mixer(layer.mixer)(model, mixer_options, rngs)
        if layer.ffn != "none":
            self.ffn_residual = Residual(model)
            self.ffn = registry.feed_forward(layer.ffn)(model, ffn_options, rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        state: Any = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Any, dict]:
        """(x, new decode state or None, auxiliary values by "mixer" and "ffn")."""
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        entered = context.shard(self.mixer_residual.enter(x), "batch", "length", "embed")
        branch, state, mixer_aux = context.mix(self.mixer, entered, context, state)
        x = self.mixer_residual.leave(x, branch, keys[0])
        ffn_aux = {}
        if hasattr(self, "ffn"):
            entered = context.shard(self.ffn_residual.enter(x), "batch", "length", "embed")
            branch, ffn_aux = in_pieces(self.ffn, entered, context, self.ffn_tokens_at_once)
            x = self.ffn_residual.leave(x, branch, keys[1])
        return x, state, {"mixer": mixer_aux, "ffn": ffn_aux}


def in_pieces(
    ffn: nnx.Module, x: Float[Array, "B T D"], context: Context, at_once: int | None
) -> tuple[Float[Array, "B T D"], dict]:
    """`ffn` on `at_once` tokens of a row on each device at a time, computed again for gradients.

    So its hidden features need memory for these tokens only (ALST, arXiv 2506.13996).
    """
    devices = context.split.tokens
    length = x.shape[1] // devices
    if at_once is None or at_once >= length:
        return ffn(x, context)
    if length % at_once:
        raise ConfigError(
            f"config.model.ffn_tokens_at_once={at_once} does not divide the {length} tokens of a "
            "row on each device"
        )
    graph, parameters = nnx.split(ffn)

    def piece(x):
        return nnx.merge(graph, parameters)(x, context)

    # Piece i of every device at once: a split that leaves every token on its device.
    split = x.reshape(len(x), devices, length // at_once, at_once, -1)
    pieces = jnp.moveaxis(split, 2, 0).reshape(length // at_once, len(x), devices * at_once, -1)
    y, aux = jax.lax.map(jax.checkpoint(piece, prevent_cse=False), pieces)
    y = jnp.moveaxis(y.reshape(-1, len(x), devices, at_once, x.shape[2]), 0, 2).reshape(x.shape)
    return y, jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), aux)


def dropout(
    x: Float[Array, "B T D"], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "B T D"]:
    """Zero a share `rate` of the features and scale up the rest; `key=None` is the identity."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
